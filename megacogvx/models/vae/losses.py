"""The losses of VAE training: weighted L1 + perceptual + KL (CogVideoX paper, section 2.1)."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from megacogvx import draws
from megacogvx.config import Section
from megacogvx.models.vae import gaussian

RANDOM_NET_SEED = 0  # of the perceptual net, not the run's: runs with different seeds minimise the same loss
RANDOM_NET_WIDTHS = (8, 16, 32)


class VAELossConfig(Section):
    """Weights of the loss terms, config section `loss` of a VAE run.

    Attributes:
        l1_weight: of the mean absolute error of a pixel value.
        perceptual_weight: of the distance between features.
        perceptual: which features: none, or "random_net", a small frozen random net for tests and demonstrations.
        kl_weight: of the KL divergence in nats per pixel value.
    """

    l1_weight: float = Field(1.0, ge=0)
    perceptual_weight: float = Field(0.1, ge=0)
    perceptual: Literal["none", "random_net"] = "random_net"
    kl_weight: float = Field(1e-6, ge=0)


class VAELosses(NamedTuple):
    """`total` is what is minimised; `terms` its parts, each a scalar before weighting, by name."""

    total: torch.Tensor
    terms: dict[str, torch.Tensor]


class VAELoss(nn.Module):
    """The weighted sum of the terms; frozen nets live here, without parameters and outside checkpoints."""

    def __init__(self, config: VAELossConfig, in_channels: int = 3) -> None:
        """Make the frozen nets that `config` asks for."""
        super().__init__()
        self.config = config
        use_net = config.perceptual == "random_net" and config.perceptual_weight > 0
        self.perceptual_random_net = PerceptualRandomNet(in_channels) if use_net else None

    def forward(
        self, video_BCTHW: torch.Tensor, reconstruction_BCTHW: torch.Tensor, moments_B2CTHW: torch.Tensor
    ) -> VAELosses:
        """Compare a clip with its reconstruction.

        Args:
            video_BCTHW, reconstruction_BCTHW: `[B, C, T, H, W]` in [-1, 1].
            moments_B2CTHW: what the encoder gave.

        Returns:
            fp32 scalars, means over the batch: total, and the terms "l1", "kl" and, if used, "perceptual_random_net".
        """
        assert video_BCTHW.shape == reconstruction_BCTHW.shape, (video_BCTHW.shape, reconstruction_BCTHW.shape)
        terms = {
            "l1": l1(video_BCTHW, reconstruction_BCTHW),
            "kl": kl_per_value(moments_B2CTHW, video_BCTHW.numel()),
        }
        total = self.config.l1_weight * terms["l1"] + self.config.kl_weight * terms["kl"]
        if self.perceptual_random_net is not None:
            terms["perceptual_random_net"] = self.perceptual_random_net(video_BCTHW, reconstruction_BCTHW)
            total = total + self.config.perceptual_weight * terms["perceptual_random_net"]
        return VAELosses(total, terms)


def l1(video_BCTHW: torch.Tensor, reconstruction_BCTHW: torch.Tensor) -> torch.Tensor:
    """Return the mean absolute error of a pixel value, fp32."""
    return F.l1_loss(reconstruction_BCTHW.float(), video_BCTHW.float())


def kl_per_value(moments_B2CTHW: torch.Tensor, video_values: int) -> torch.Tensor:
    """Return the KL divergence of all latents in nats, divided by the pixel values they code.

    This keeps the balance of summed losses (latent diffusion, arXiv 2112.10752, weighs sums over a sample) at every
    clip size and compression.
    """
    return gaussian.kl(moments_B2CTHW).sum() / video_values


class PerceptualRandomNet(nn.Module):
    """Distance between features of a frozen random convolution net, frame by frame, at three scales.

    Random features already see edges and textures that L1 blurs. Features are normalised to length 1 over the
    channels and compared by the squared L2 distance, as LPIPS does (arXiv 1801.03924, equation 1) with trained ones.
    """

    def __init__(self, in_channels: int = 3) -> None:
        """Draw the fixed weights: convolutions 3 x 3 with ReLU, the first at full size, each other at half."""
        super().__init__()
        before = in_channels
        for index, width in enumerate(RANDOM_NET_WIDTHS):
            scale = math.sqrt(2.0 / (9 * before))  # He et al., arXiv 1502.01852: keeps the variance through ReLU
            weight = scale * draws.normal((width, before, 3, 3), RANDOM_NET_SEED, "perceptual_random_net", index)
            self.register_buffer(f"weight{index}", weight, persistent=False)
            before = width

    def forward(self, video_BCTHW: torch.Tensor, reconstruction_BCTHW: torch.Tensor) -> torch.Tensor:
        """Return the fp32 mean distance, 0 for equal videos and at most 4 per scale."""
        with torch.no_grad():
            expected = self.features(video_BCTHW)
        pairs = zip(expected, self.features(reconstruction_BCTHW), strict=True)
        return torch.stack([(a - b).square().sum(dim=1).mean() for a, b in pairs]).sum()

    def features(self, video_BCTHW: torch.Tensor) -> list[torch.Tensor]:
        """Return `[B * T, C, H, W]` of unit length over C, at full, half and quarter size."""
        x = video_BCTHW.float().transpose(1, 2).flatten(0, 1)
        scales = []
        for index in range(len(RANDOM_NET_WIDTHS)):
            x = F.relu(F.conv2d(x, self.get_buffer(f"weight{index}"), stride=1 if index == 0 else 2, padding=1))
            scales.append(x * torch.rsqrt(x.square().sum(dim=1, keepdim=True) + 1e-6))  # finite where all are 0
        return scales
