"""How well a VAE keeps a clip: PSNR, SSIM and flickering (CogVideoX paper, table 1 and section 2.1).

A video is uint8 `[..., T, H, W, C]` in 0..255, as decoded, or floating `[..., C, T, H, W]` in [-1, 1], as the VAE sees
it (clamped to that range); both kinds may be mixed. Results have the shape of the leading axes, one number per clip.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from megacogvx.errors import DataError

GREY_LEVELS = 255.0
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # pixels; Wang et al. 2004, section III.C
SSIM_K1, SSIM_K2 = 0.01, 0.03


def psnr(video: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
    """Return the peak signal-to-noise ratio in dB, 10 log10(255^2 / MSE), the error meant over the whole clip.

    Returns:
        fp64, one per clip; infinite for equal clips.

    Raises:
        DataError: a video is neither of the kinds above, or the shapes differ.
    """
    a, b = _pair(video, reconstruction)
    error = (a - b).square().mean(dim=(-4, -3, -2, -1))
    return 10.0 * torch.log10(GREY_LEVELS**2 / error)


def ssim(video: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
    """Return the structural similarity (Wang et al. 2004, equation 13), per frame and colour, meant over the clip.

    A Gaussian window of 11 x 11 pixels (sigma 1.5) at every position where it fits whole.

    Returns:
        fp64, one per clip, at most 1, which equal clips reach.

    Raises:
        DataError: as for `psnr`, or frames are smaller than the window.
    """
    a, b = _pair(video, reconstruction)
    if min(a.shape[-2:]) < SSIM_WINDOW:
        raise DataError(
            f"frames of {a.shape[-2]} x {a.shape[-1]} pixels (H, W) are smaller than the window of SSIM, "
            f"{SSIM_WINDOW} x {SSIM_WINDOW}"
        )
    mean_a, mean_b = _blur(a), _blur(b)
    variance_a = _blur(a.square()) - mean_a.square()
    variance_b = _blur(b.square()) - mean_b.square()
    covariance = _blur(a * b) - mean_a * mean_b
    c1, c2 = (SSIM_K1 * GREY_LEVELS) ** 2, (SSIM_K2 * GREY_LEVELS) ** 2
    likeness = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    likeness /= (mean_a.square() + mean_b.square() + c1) * (variance_a + variance_b + c2)
    return likeness.mean(dim=(-4, -3, -2, -1))


def flickering(video: torch.Tensor) -> torch.Tensor:
    """Return the mean absolute difference of neighbouring frames, in grey levels (0..255).

    Real motion counts too: compare a reconstruction with its source, not with zero.

    Returns:
        fp64, one per clip; 0 for a clip of one frame.

    Raises:
        DataError: the video is neither of the kinds above.
    """
    frames = _grey_levels(video)
    if frames.shape[-3] == 1:
        return frames.new_zeros(frames.shape[:-4])
    return (frames[..., 1:, :, :] - frames[..., :-1, :, :]).abs().mean(dim=(-4, -3, -2, -1))


def _pair(video: torch.Tensor, reconstruction: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = _grey_levels(video), _grey_levels(reconstruction)
    if a.shape != b.shape:
        raise DataError(
            f"a video and its reconstruction must have one shape, not {list(a.shape)} and {list(b.shape)} "
            f"([..., C, T, H, W])"
        )
    return a, b


def _grey_levels(video: torch.Tensor) -> torch.Tensor:
    """Return fp64 `[..., C, T, H, W]` in 0..255."""
    if video.ndim < 4 or 0 in video.shape:
        raise DataError(f"a video has the axes T, H, W, C (uint8) or C, T, H, W (floating), not {list(video.shape)}")
    if video.dtype == torch.uint8:
        return video.double().movedim(-1, -4)
    if video.is_floating_point():
        return (video.double().clamp(-1.0, 1.0) + 1.0) * (GREY_LEVELS / 2)
    raise DataError(f"a video is uint8 in 0..255 or floating in [-1, 1], not {video.dtype}")


def _blur(x: torch.Tensor) -> torch.Tensor:
    """Weigh `[..., H, W]` with the Gaussian window, first along H, then along W, without padding."""
    place = torch.arange(SSIM_WINDOW, dtype=x.dtype, device=x.device) - (SSIM_WINDOW - 1) / 2
    window = torch.exp(-place.square() / (2 * SSIM_SIGMA**2))
    window /= window.sum()
    frames = x.reshape(math.prod(x.shape[:-2]), 1, *x.shape[-2:])
    frames = F.conv2d(F.conv2d(frames, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
    return frames.reshape(*x.shape[:-2], *frames.shape[-2:])
