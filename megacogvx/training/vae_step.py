"""One training step of the VAE: reconstruct this rank's clips and score them (CogVideoX paper, section 2.1).

The context ranks share the frames of the same clips (`parallel.frame_parallel`). Every loss is a mean over frames, so
a rank's part of it is the mean over its own frames times its share of the clip.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from megacogvx import draws
from megacogvx.data.clip_loader import ClipBatch
from megacogvx.models.vae.config import VAEConfig
from megacogvx.models.vae.losses import VAELoss
from megacogvx.models.vae.model import Reconstruction
from megacogvx.parallel.data_parallel import unwrap
from megacogvx.parallel.frame_parallel import FrameShard, shard_pixels
from megacogvx.parallel.groups import ParallelGroups
from megacogvx.training.adversary import GENERATOR_TERMS, Adversary
from megacogvx.training.step import LossFunction
from megacogvx_kernels.transfer import to_device


class VAEStep:
    """The forward step of VAE training.

    Args:
        config: section `vae`, for the shape of the latents.
        loss: the weighted terms.
        seed: of the posterior's noise.
        groups: which clips of the step this rank holds, and which of their frames.
        dtype: the model's.
        adversary: None trains without a GAN term.
    """

    def __init__(
        self,
        config: VAEConfig,
        loss: VAELoss,
        seed: int,
        groups: ParallelGroups,
        dtype: torch.dtype,
        adversary: Adversary | None = None,
    ):
        self.config, self.losses, self.seed, self.groups, self.dtype = config, loss, seed, groups, dtype
        self.adversary = adversary

    def __call__(
        self, microbatches: Iterator[ClipBatch], model: torch.nn.Module
    ) -> tuple[Reconstruction, LossFunction]:
        """Take the next clips forward; returns the reconstruction and the function that scores it."""
        batch = next(microbatches)
        shard = self.shard(batch)
        clips_BCTHW = batch.video_BCTHW if shard is None else shard.cut(batch.video_BCTHW)
        noise_BCTHW = self.noise(batch, shard)
        video_BCTHW, noise_BCTHW = (to_device(x, self.groups.device, self.dtype) for x in (clips_BCTHW, noise_BCTHW))
        reconstruction = model(video_BCTHW, noise_BCTHW, shard)
        adversary = self.adversary if self.adversary is not None and self.adversary.is_on(batch.step) else None
        last_weight = unwrap(model).get_parameter("decoder.conv_out.weight")
        return reconstruction, partial(self.loss, video_BCTHW, shard, adversary, last_weight)

    def shard(self, batch: ClipBatch) -> FrameShard | None:
        """Return this rank's frames of the clips; None if it takes all of them.

        An image can't be split: all context ranks compute it, and each counts it in equal parts.
        """
        frames, group = batch.video_BCTHW.shape[2], self.groups.context_group
        if frames == 1 or group.size() == 1:
            return None
        return shard_pixels(frames, self.config.temporal_compression_ratio, group)

    def noise(self, batch: ClipBatch, shard: FrameShard | None = None) -> torch.Tensor:
        """Draw the posterior's noise `[B, C, T', H', W']` fp32 for this rank's latent frames.

        Each frame is drawn from (seed, step, the clip's place in the step, latent frame).
        """
        clips, _, total, height, width = batch.video_BCTHW.shape
        channels, latent_frames, *cells = self.config.latent_shape(total, height, width)
        mine = range(latent_frames)
        if shard is not None:
            latents = shard.halved(self.config.temporal_levels)
            mine = range(latents.start, latents.stop)
        rank, size = self.groups.data
        places = range(rank, rank + clips * size, size)
        frame = (channels, *cells)
        drawn = [draws.normal_frames(mine, frame, self.seed, "posterior", batch.step, place) for place in places]
        return torch.stack(drawn).transpose(1, 2)

    def loss(
        self,
        video_BCTHW: torch.Tensor,
        shard: FrameShard | None,
        adversary: Adversary | None,
        last_weight: torch.Tensor,
        reconstruction: Reconstruction,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Return this rank's part of (loss summed over the clips, number of clips, sums for the log).

        The first context rank counts the clips, so that the count over all ranks is their true number.
        """
        losses, clips = self.losses(video_BCTHW, *reconstruction), len(video_BCTHW)
        weight = clips * (1.0 / self.groups.context[1] if shard is None else shard.share)
        total = losses.total * weight
        sums = [term.detach() * weight for term in losses.terms.values()]
        if adversary is not None:
            gan_mean, gan_share = adversary.judge(video_BCTHW, reconstruction.video_BCTHW, shard)
            gan = gan_mean * clips * gan_share
            scale = adversary.scale(losses.reconstruction * weight, gan, last_weight, clips * self.groups.data[1])
            total = total + self.losses.config.gan_weight * scale * gan
            sums += [gan.detach(), scale * weight, (losses.total * weight).detach()]
        stacked = torch.stack([total.detach(), *sums, torch.full_like(total.detach(), weight)])
        count = torch.full((), clips if self.groups.context[0] == 0 else 0, dtype=torch.int32, device=total.device)
        return total, count, {"sums": stacked}

    def read_log_sums(self, sums: torch.Tensor) -> dict[str, float]:
        """Turn the sums of all ranks into means over the clips of the step, by the names of the terms."""
        *totals, clips = sums.tolist()
        names = ("loss", *self.losses.term_names, *GENERATOR_TERMS)[: len(totals)]  # the last three: a GAN's
        return {name: total / clips for name, total in zip(names, totals, strict=True)}
