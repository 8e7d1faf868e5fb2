"""A pack becomes the rows that one rank computes with: posterior draw, noise, timestep, text, image, dropout.

A rank draws only the latent frames that its rows touch; each draw comes from (seed, what, step, sample id, frame),
so the rows of two layouts are cuts of the same pack.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megacogvx import draws
from megacogvx.data.pack import Pack
from megacogvx.diffusion.config import DiffusionConfig
from megacogvx.diffusion.image_condition import image_channels
from megacogvx.diffusion.objective import loss_count
from megacogvx.diffusion.schedule import NoiseSchedule
from megacogvx.models.vae import gaussian
from megacogvx.pack_layout import LocalPack, PackLayout, RowSlice
from megacogvx.parallel.groups import ParallelGroups
from megacogvx.patches import patchify
from megacogvx.training.image_condition import ImageLatents
from megacogvx.training.text_condition import TextRows
from megacogvx_kernels.transfer import to_device


@dataclass(frozen=True)
class Batch:
    """What one rank needs of one pack, on the rank's device.

    Attributes:
        video_SP: noisy video rows `[V_local, P]`, model dtype; image to video: noisy latents, then the image's.
        text_SE: text rows `[T_local, E]`, model dtype; zeros in the padding, and where the conditioning is dropped
            (or the empty prompt there).
        target_SP: velocity rows `[V_local, P]` of the noisy latents alone, fp32.
        timesteps_M: int64 `[M]`; 0 for the padding.
        count: what this context shard adds to the divisor of the summed loss; equal on all its tensor ranks.
        layout, local: the pack's layout and this rank's cut of it.
    """

    video_SP: torch.Tensor
    text_SE: torch.Tensor
    target_SP: torch.Tensor
    timesteps_M: torch.Tensor
    count: int
    layout: PackLayout
    local: LocalPack


@dataclass(frozen=True)
class BatchMaker:
    """Makes batches of packs; holds what doesn't change during a run.

    Attributes:
        diffusion: the section `diffusion`.
        schedule: the noise schedule.
        scaling_factor: VAE latents are multiplied by it.
        seed: of all draws.
        groups: which rank this is, and its device.
        dtype: the model's.
        texts: what text rows are made of; None: of stored embeddings, zeros where they are dropped.
        images: makes the latents of first frames, on ranks whose stage reads rows; None: text to video.
    """

    diffusion: DiffusionConfig
    schedule: NoiseSchedule
    scaling_factor: float
    seed: int
    groups: ParallelGroups
    dtype: torch.dtype
    texts: TextRows | None = None
    images: ImageLatents | None = None

    def prepare(self, pack: Pack, timesteps: list[int]) -> Batch:
        """Return this rank's rows of `pack`, noised.

        Args:
            pack: the whole pack, on the CPU.
            timesteps: one of 0 .. T-1 for each real sample.
        """
        layout, device = pack.layout, self.groups.device
        local = layout.local(self.groups.tensor, self.groups.context, device)
        row_size = pack.latents[0].shape[-1] // 2 * layout.patch[0] * layout.patch[1] * layout.patch[2]
        rows = [self._video_rows(pack, piece, timesteps[piece.sample]) for piece in local.video_slices]
        row_size_in = row_size if self.images is None else 2 * row_size
        noisy_SP = torch.cat([torch.empty(0, row_size_in), *(noisy for noisy, _ in rows)])
        target_SP = torch.cat([torch.empty(0, row_size), *(target for _, target in rows)])
        return Batch(
            video_SP=to_device(noisy_SP, device, self.dtype),
            text_SE=to_device(self._text_rows(pack, local), device, self.dtype),
            target_SP=to_device(target_SP, device),
            timesteps_M=to_device(torch.tensor([*timesteps, 0]), device),
            count=loss_count(layout, local.context_tokens, self.diffusion.loss_mean),
            layout=layout,
            local=local,
        )

    def drops_conditioning(self, step: int, sample_id: int) -> bool:
        """Return whether this sample sees no text at this step (classifier-free guidance)."""
        return draws.uniform(self.seed, "conditioning", step, sample_id) < self.diffusion.conditioning_dropout

    def _video_rows(self, pack: Pack, piece: RowSlice, timestep: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (noisy, target) rows `[rows, P]` fp32 of one sample's slice; only its latent frames are touched."""
        sample, patch = pack.layout.samples[piece.sample], pack.layout.patch
        frame_rows = sample.grid[1] * sample.grid[2]
        first, last = piece.start // frame_rows, -(-piece.stop // frame_rows)  # frames of the grid
        # latent frames count from the first real one, so the repeated frames in front are -repeated .. -1
        frames = range(first * patch[0] - sample.repeated_frames, last * patch[0] - sample.repeated_frames)
        latents_TCHW = self._latents(pack, piece.sample, frames)
        shape = tuple(latents_TCHW.shape[1:])
        noise_TCHW = draws.normal_frames(frames, shape, self.seed, "noise", pack.step, sample.sample_id)
        noisy_TCHW = self.schedule.add_noise(latents_TCHW, noise_TCHW, timestep)
        target_TCHW = self.schedule.velocity(latents_TCHW, noise_TCHW, timestep)
        if self.images is not None:
            image_TCHW = image_channels(self._image(pack, piece.sample, frames, shape), frames, sample.repeated_frames)
            noisy_TCHW = torch.cat([noisy_TCHW, image_TCHW], dim=1)
        cut = slice(piece.start - first * frame_rows, piece.stop - first * frame_rows)
        return patchify(noisy_TCHW, patch)[cut], patchify(target_TCHW, patch)[cut]

    def _image(self, pack: Pack, place: int, frames: range, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the image latents `[C, H, W]` of a sample; zeros where it is dropped, or `frames` don't see it."""
        assert self.images is not None
        sample = pack.layout.samples[place]
        dropped = not sample.carries_loss or self.images.drops(pack.step, sample.sample_id)
        if -sample.repeated_frames not in frames or dropped:
            return torch.zeros(shape)
        pixels_HW3 = pack.images[place]
        assert pixels_HW3 is not None, f"sample {sample.sample_id} was read without its first frame"
        return self.images(pixels_HW3, pack.step, sample.sample_id)

    def _latents(self, pack: Pack, place: int, frames: range) -> torch.Tensor:
        """Draw scaled latents `[T, C, H, W]` fp32 of `frames`; a negative frame is a copy of frame 0."""
        real = range(max(0, frames.start), max(1, frames.stop))
        moments_TCHW = pack.frames(place, real).float().permute(0, 3, 1, 2)
        shape = (moments_TCHW.shape[1] // 2, *moments_TCHW.shape[2:])
        sample_id = pack.layout.samples[place].sample_id
        noise_TCHW = draws.normal_frames(real, shape, self.seed, "posterior", pack.step, sample_id)
        latents_TCHW = gaussian.sample(moments_TCHW, noise_TCHW) * self.scaling_factor
        return latents_TCHW[torch.tensor([max(0, frame) - real.start for frame in frames])]

    def _text_rows(self, pack: Pack, local: LocalPack) -> torch.Tensor:
        """Return the local text rows `[T_local, E]` bf16; the padding's are zeros."""
        texts = self.texts or TextRows(pack.text[0].shape[1])
        parts = [torch.empty(0, texts.width, dtype=torch.bfloat16)]
        for piece in local.text_slices:
            sample = pack.layout.samples[piece.sample]
            if piece.sample == pack.layout.num_samples - 1:
                parts.append(torch.zeros(piece.stop - piece.start, texts.width, dtype=torch.bfloat16))
            elif self.drops_conditioning(pack.step, sample.sample_id):
                parts.append(texts.dropped(sample.text_length)[piece.start : piece.stop])
            else:
                parts.append(texts.rows(pack.text[piece.sample])[piece.start : piece.stop].bfloat16())
        return torch.cat(parts)
