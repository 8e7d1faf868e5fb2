"""Images and videos that sampling starts from: files to pixels of the size that is made, pixels to scaled latents.

Latents are drawn from the VAE's posterior, as the released pipelines do, with noise by (seed, place, latent frame): the
same draw on every layout and in every restart.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megacogvx import draws
from megacogvx.data.images import check_image, read_image
from megacogvx.data.transforms import Size, cover, to_model_range
from megacogvx.data.video import clip_times, frames_at, probe
from megacogvx.diffusion.image_condition import ImageLatentScale, noised_image, scaled_image_latents
from megacogvx.errors import DataError
from megacogvx.models.vae import gaussian
from megacogvx.models.vae.model import CogVideoXVAE
from megacogvx.models.vae.tiling import WHOLE, Coding
from megacogvx.parallel.frame_parallel import gather_frames, shard_pixels
from megacogvx.parallel.groups import ParallelGroups

SLACK_FRAMES = 0.5  # headers round durations: a video this much too short is tried


@dataclass(frozen=True)
class ConditionEncoder:
    """A VAE that turns what a video starts from into what the transformer reads.

    Attributes:
        vae: in evaluation mode.
        scaling_factor: what the transformer's latents are multiplied by.
        image_scale: whether an image's latents are multiplied or divided by it (`conventions.image_latent_scale`).
        coding: how much the VAE codes at once.
        image_noise: standard deviation of the noise on an image's pixels, in units of [-1, 1]; 0 as released.
        groups: ranks that share the frames of a video; None: this process encodes alone.
    """

    vae: CogVideoXVAE
    scaling_factor: float
    image_scale: ImageLatentScale = "multiply"
    coding: Coding = WHOLE
    image_noise: float = 0.0
    groups: ParallelGroups | None = None

    def image(self, pixels_CHW: torch.Tensor, seed: int, place: int = 0) -> torch.Tensor:
        """Encode the first frame of a video to come.

        Args:
            pixels_CHW: fp32 `[3, H, W]` in [-1, 1].
            seed, place: of the draws, as in `Denoiser.sample`.

        Returns:
            fp32 `[C, H', W']`, scaled as the model wants an image's.
        """
        noise_CHW = draws.normal(tuple(pixels_CHW.shape), seed, "sampling image noise", place)
        noised_CHW = noised_image(pixels_CHW, noise_CHW.to(pixels_CHW.device), self.image_noise)
        (latents_CHW,) = self._posterior(noised_CHW[:, None], seed, "sampling image posterior", place)
        return scaled_image_latents(latents_CHW, self.scaling_factor, self.image_scale)

    def video(self, pixels_CTHW: torch.Tensor, seed: int, place: int = 0) -> torch.Tensor:
        """Encode a video to start from: fp32 `[3, T, H, W]` in [-1, 1] to scaled fp32 `[T', C, H', W']`."""
        return self._posterior(pixels_CTHW, seed, "sampling video posterior", place) * self.scaling_factor

    @torch.no_grad()
    def _posterior(self, pixels_CTHW: torch.Tensor, seed: int, what: str, place: int) -> torch.Tensor:
        weight = next(self.vae.parameters())
        moments_B2CTHW = self._moments(pixels_CTHW[None].to(weight)).float()
        _, channels, frames, *cell = moments_B2CTHW.shape
        noise_TCHW = draws.normal_frames(range(frames), (channels // 2, *cell), seed, what, place)
        noise_BCTHW = noise_TCHW.transpose(0, 1)[None].to(moments_B2CTHW)
        return gaussian.sample(moments_B2CTHW, noise_BCTHW)[0].transpose(0, 1)

    def _moments(self, video_BCTHW: torch.Tensor) -> torch.Tensor:
        frames = video_BCTHW.shape[2]
        if self.groups is None or frames == 1:
            return self.vae.encode(video_BCTHW, self.coding)
        group = self.groups.replica_group
        shard = shard_pixels(frames, self.vae.config.temporal_compression_ratio, group)
        return gather_frames(self.vae.encode(shard.cut(video_BCTHW), self.coding, shard=shard), group)


def read_first_frame(path: Path, size: Size) -> torch.Tensor:
    """Read an image, resized and cropped at its centre to `size` = (height, width): fp32 `[3, H, W]` in [-1, 1].

    Raises:
        DataError: the file is missing, damaged, no image, or too large to decode.
    """
    check_image(path)
    return to_model_range(cover(read_image(path)[None], size))[:, 0]


def read_start(path: Path, size: Size, frames: int, fps: float) -> torch.Tensor:
    """Read the first `frames` frames of a video at `fps` frames per second: fp32 `[3, T, H, W]` in [-1, 1].

    Raises:
        DataError: the file is missing, damaged, no video, or ends before.
    """
    aspect = probe(path).pixel_aspect
    shown = [cover(frame_HW3[None], size, aspect) for frame_HW3 in frames_at(path, clip_times(0.0, frames, fps))]
    return to_model_range(torch.cat(shown))


def check_start(path: Path, frames: int, fps: float, period: int) -> None:
    """Check, from its header and first frame, that a video is long enough.

    Args:
        path: a video file.
        frames: frames that are taken.
        fps: at this many frames per second.
        period: numbers of frames that can be made are multiples of this, plus 1.

    Raises:
        DataError: it can't be read, or is too short; with what would work.
    """
    info = probe(path)
    held = info.duration * fps
    if not info.duration or held + SLACK_FRAMES >= frames:
        return
    fit = max(1, (int(held) - 1) // period * period + 1)
    raise DataError(
        f"video {path} lasts {info.duration:.2f} s, which is {held:.1f} frames at --fps {fps:g}, fewer than the "
        f"{frames} that are asked for; --frames {fit} works, or --fps {frames / info.duration:.2f} and more"
    )
