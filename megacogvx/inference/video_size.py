"""The size of a video that is asked for, in frames and pixels, and which sizes a VAE gives back whole."""

from __future__ import annotations

from dataclasses import dataclass

from megacogvx.errors import ConfigError
from megacogvx.models.vae.config import VAEConfig


@dataclass(frozen=True)
class VideoSize:
    """What is asked for: frames, and pixels of height and width."""

    frames: int
    height: int
    width: int

    def check(self, vae: VAEConfig, patch_size: int) -> None:
        """Check that latents of this size exist and divide into patches.

        Raises:
            ConfigError: every size that doesn't work, with the nearest ones that do, and for frames what would come
                out in their place.
        """
        period = period_of(vae)
        pixels = vae.spatial_compression_ratio * patch_size
        problems = []
        if self.frames < 1 or self.frames % period != 1 % period:
            below = max(1, (self.frames - 1) // period * period + 1)
            problems.append(
                f"--frames {self.frames} must be {period}k + 1{self._made(vae)}; nearest: {below}, {below + period}"
            )
        for name, size in (("--height", self.height), ("--width", self.width)):
            if size < pixels or size % pixels:
                below = size // pixels * pixels
                near = f"{below}, {below + pixels}" if below else str(pixels)
                problems.append(f"{name} {size} must be a multiple of {pixels} pixels; nearest: {near}")
        if problems:
            raise ConfigError("; ".join(problems))

    def _made(self, vae: VAEConfig) -> str:
        if self.frames < 1:
            return ""
        latents = vae.latent_frames(self.frames)
        made = vae.decoded_frames(latents)
        first = "" if latents % 2 else ", the first of which doesn't stand alone as it does in training"
        return f" ({latents} latent frames would give {made} frames{first})"


def period_of(vae: VAEConfig) -> int:
    """Return p so that p k + 1 frames come back from the VAE as many as went in, the first one alone."""
    return 2 * vae.temporal_compression_ratio if vae.temporal_compression_ratio > 1 else 1
