"""The diagonal Gaussian posterior that an encoder's moments stand for (Kingma & Welling, arXiv 1312.6114)."""

from __future__ import annotations

import torch

LOG_VARIANCE_RANGE = (-30.0, 20.0)


def split(moments_B2CTHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and log variance, each `[B, C, ...]`; the log variance clamped to [-30, 20].

    Args:
        moments_B2CTHW: `[B, 2 C, ...]`, the means first.
    """
    assert moments_B2CTHW.shape[1] % 2 == 0, tuple(moments_B2CTHW.shape)
    mean, log_variance = moments_B2CTHW.chunk(2, dim=1)
    return mean, log_variance.clamp(*LOG_VARIANCE_RANGE)


def mode(moments_B2CTHW: torch.Tensor) -> torch.Tensor:
    """Return the most likely latents: the means."""
    return split(moments_B2CTHW)[0]


def sample(moments_B2CTHW: torch.Tensor, noise_BCTHW: torch.Tensor) -> torch.Tensor:
    """Return z = mean + exp(log variance / 2) * noise.

    Args:
        moments_B2CTHW: `[B, 2 C, ...]`.
        noise_BCTHW: `[B, C, ...]`, drawn from N(0, 1) by the caller.
    """
    mean, log_variance = split(moments_B2CTHW)
    assert noise_BCTHW.shape == mean.shape, (tuple(noise_BCTHW.shape), tuple(mean.shape))
    return mean + torch.exp(0.5 * log_variance) * noise_BCTHW.to(mean.dtype)


def kl(moments_B2CTHW: torch.Tensor) -> torch.Tensor:
    """Return KL(posterior || N(0, 1)) of every latent element in nats: (mean^2 + var - 1 - log var) / 2, fp32."""
    mean, log_variance = split(moments_B2CTHW.float())
    return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance)
