"""Image to video: the latents of the first frame in extra channels beside the noisy ones (CogVideoX, appendix D).

Training and sampling share these lines, so that a model meets its image where it learned to look for it. The released
weights' conventions, as in diffusers' CogVideoXImageToVideoPipeline.
"""

from __future__ import annotations

from typing import Literal

import torch

ImageLatentScale = Literal["multiply", "divide"]


def noised_image(pixels: torch.Tensor, noise: torch.Tensor, sigma: float) -> torch.Tensor:
    """Return `pixels + sigma * noise`: the noise goes on the pixels, before the VAE; sampling adds none.

    Args:
        pixels: the image in [-1, 1], any shape.
        noise: N(0, 1) of its shape.
        sigma: standard deviation, in units of `pixels`; training draws exp(N(-3, 0.5)) per sample.
    """
    assert noise.shape == pixels.shape, (tuple(noise.shape), tuple(pixels.shape))
    return pixels + sigma * noise.to(pixels)


def scaled_image_latents(latents: torch.Tensor, scaling_factor: float, scale: ImageLatentScale) -> torch.Tensor:
    """Return the image's latents as the model wants them, fp32.

    Args:
        latents: drawn from the VAE's posterior.
        scaling_factor: what the video's latents are multiplied by.
        scale: "multiply" by it too (1.0), or "divide" by it (the released 1.5 weights; `invert_scale_latents`).
    """
    return latents.float() * (scaling_factor if scale == "multiply" else 1.0 / scaling_factor)


def image_channels(image_CHW: torch.Tensor, frames: range, repeated: int = 0) -> torch.Tensor:
    """Return what stands beside some latent frames of a video: the image at the very first, zeros at all others.

    With temporal patches the very first one is the first repetition in front, which is dropped after sampling: the
    released 1.5 weights see their image there alone.

    Args:
        image_CHW: scaled latents of the image `[C, H, W]`; zeros where the image is dropped.
        frames: which latent frames, counted from the first real one; repetitions are -repeated .. -1.
        repeated: how many repetitions of the first frame stand in front.

    Returns:
        `[len(frames), C, H, W]`, to be put after the noisy channels: `torch.cat([noisy, image], dim=1)`.
    """
    channels_TCHW = image_CHW.new_zeros(len(frames), *image_CHW.shape)
    if -repeated in frames:
        channels_TCHW[frames.index(-repeated)] = image_CHW
    return channels_TCHW
