"""One training step of the VAE: reconstruct this rank's clips and score them (CogVideoX paper, section 2.1)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from megacogvx import draws
from megacogvx.data.clips import ClipBatch
from megacogvx.models.vae.config import VAEConfig
from megacogvx.models.vae.losses import VAELoss
from megacogvx.models.vae.model import Reconstruction
from megacogvx.parallel.groups import ParallelGroups
from megacogvx.training.step import LossFunction

TERMS = ("loss", "l1", "perceptual_random_net", "kl")


class VAEStep:
    """The forward step of VAE training.

    Args:
        config: section `vae`, for the shape of the latents.
        loss: the weighted terms.
        seed: of the posterior's noise.
        groups: which clips of the step this rank holds.
        dtype: the model's.
    """

    def __init__(self, config: VAEConfig, loss: VAELoss, seed: int, groups: ParallelGroups, dtype: torch.dtype):
        self.config, self.losses, self.seed, self.groups, self.dtype = config, loss, seed, groups, dtype

    def __call__(
        self, microbatches: Iterator[ClipBatch], model: torch.nn.Module
    ) -> tuple[Reconstruction, LossFunction]:
        """Take the next clips forward; returns the reconstruction and the function that scores it."""
        batch = next(microbatches)
        video_BCTHW = batch.video_BCTHW.to(self.groups.device, self.dtype)
        reconstruction = model(video_BCTHW, self.noise(batch).to(video_BCTHW))
        return reconstruction, partial(self.loss, video_BCTHW)

    def noise(self, batch: ClipBatch) -> torch.Tensor:
        """Draw the posterior's noise `[B, C, T', H', W']` fp32, from (seed, step, the clip's place in the step)."""
        clips, _, frames, height, width = batch.video_BCTHW.shape
        shape = self.config.latent_shape(frames, height, width)
        rank, size = self.groups.data
        places = range(rank, rank + clips * size, size)
        return torch.stack([draws.normal(shape, self.seed, "posterior", batch.step, place) for place in places])

    def loss(
        self, video_BCTHW: torch.Tensor, reconstruction: Reconstruction
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Return (loss summed over the clips, number of clips, sums for the log)."""
        losses, clips = self.losses(video_BCTHW, *reconstruction), len(video_BCTHW)
        terms = [losses.terms.get(name, torch.zeros_like(losses.total)) for name in TERMS[1:]]
        sums = torch.stack([losses.total, *terms, torch.ones_like(losses.total)]).detach() * clips
        return losses.total * clips, torch.tensor(clips, dtype=torch.int32, device=video_BCTHW.device), {"sums": sums}


def read_log_sums(sums: torch.Tensor) -> dict[str, float]:
    """Turn the sums of all ranks into means over the clips of the step, by the names of the terms."""
    *totals, clips = sums.tolist()
    return {name: total / clips for name, total in zip(TERMS, totals, strict=True)}
