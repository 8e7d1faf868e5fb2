"""The losses of VAE training: weighted L1 + perceptual + KL (CogVideoX paper, section 2.1).

The GAN term, which needs a discriminator beside them, is put together in `training/adversary.py`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import nn

from megacogvx import draws
from megacogvx.config import Section
from megacogvx.models.vae import gaussian
from megacogvx.models.vae.lpips import LPIPS

RANDOM_NET_SEED = 0  # of the perceptual net, not the run's: runs with different seeds minimise the same loss
RANDOM_NET_WIDTHS = (8, 16, 32)


class VAELossConfig(Section):
    """Weights of the loss terms, config section `loss` of a VAE run.

    Attributes:
        l1_weight: of the mean absolute error of a pixel value.
        perceptual_weight: of the distance between features.
        perceptual: which features: none, "lpips" (VGG-16's, whose two files have to be named), or "random_net", a small
            frozen random net for tests and demonstrations, which is no LPIPS.
        lpips_backbone: torchvision's VGG-16 weights, `vgg16-397923af.pth`.
        lpips_heads: the heads of the package lpips 0.1.4, `lpips/weights/v0.1/vgg.pth`.
        kl_weight: of the KL divergence in nats per pixel value.
        gan_weight: of the GAN term; 0 trains without a discriminator.
        gan_start_step: the first step with the GAN term, and of the discriminator's training.
        gan_weight_limit: the largest factor by which the GAN term is scaled to the reconstruction terms' gradient
            (`discriminator.adaptive_weight`); the published code of arXiv 2012.09841 has 1e4.
    """

    l1_weight: float = Field(1.0, ge=0)
    perceptual_weight: float = Field(0.1, ge=0)
    perceptual: Literal["none", "random_net", "lpips"] = "random_net"
    lpips_backbone: Path | None = None
    lpips_heads: Path | None = None
    kl_weight: float = Field(1e-6, ge=0)
    gan_weight: float = Field(0.0, ge=0)
    gan_start_step: int = Field(0, ge=0)
    gan_weight_limit: float = Field(1e4, gt=0)

    @model_validator(mode="after")
    def _check(self) -> VAELossConfig:
        """Check that LPIPS has its files, and that nobody names them in vain."""
        missing = [name for name in ("lpips_backbone", "lpips_heads") if getattr(self, name) is None]
        if self.perceptual == "lpips" and missing:
            raise ValueError(
                f"perceptual=lpips needs {' and '.join(missing)}: the files of torchvision's VGG-16 weights and of the "
                "lpips package's heads (weights/v0.1/vgg.pth); without them set perceptual=random_net or none"
            )
        if self.perceptual != "lpips" and len(missing) < 2:
            raise ValueError(
                f"lpips_backbone or lpips_heads is given, but perceptual={self.perceptual} doesn't read it; set "
                "perceptual=lpips"
            )
        return self


class VAELosses(NamedTuple):
    """`total` is minimised; `terms` are its parts before weighting; `reconstruction` is the total without the KL."""

    total: torch.Tensor
    terms: dict[str, torch.Tensor]
    reconstruction: torch.Tensor


class VAELoss(nn.Module):
    """The weighted sum of the terms; frozen nets live here, without parameters and outside checkpoints."""

    def __init__(self, config: VAELossConfig, in_channels: int = 3) -> None:
        """Make the frozen nets that `config` asks for.

        Raises:
            CheckpointError: LPIPS is asked for and its files aren't what they should be.
        """
        super().__init__()
        self.config = config
        self.perceptual: nn.Module | None = None
        self.perceptual_name = {"lpips": "lpips", "random_net": "perceptual_random_net"}.get(config.perceptual, "")
        if config.perceptual_weight == 0:
            self.perceptual_name = ""
        if self.perceptual_name == "lpips":
            assert config.lpips_backbone is not None and config.lpips_heads is not None, config
            self.perceptual = LPIPS(config.lpips_backbone, config.lpips_heads)
        elif self.perceptual_name:
            self.perceptual = PerceptualRandomNet(in_channels)

    @property
    def term_names(self) -> tuple[str, ...]:
        """Names of the terms, as logs and reports show them."""
        return tuple(name for name in ("l1", self.perceptual_name, "kl") if name)

    def forward(
        self, video_BCTHW: torch.Tensor, reconstruction_BCTHW: torch.Tensor, moments_B2CTHW: torch.Tensor
    ) -> VAELosses:
        """Compare a clip with its reconstruction.

        Args:
            video_BCTHW, reconstruction_BCTHW: `[B, C, T, H, W]` in [-1, 1].
            moments_B2CTHW: what the encoder gave.

        Returns:
            fp32 scalars, means over the batch; the terms are called `term_names`.
        """
        assert video_BCTHW.shape == reconstruction_BCTHW.shape, (video_BCTHW.shape, reconstruction_BCTHW.shape)
        terms = {"l1": l1(video_BCTHW, reconstruction_BCTHW)}
        reconstruction = self.config.l1_weight * terms["l1"]
        if self.perceptual is not None:
            terms[self.perceptual_name] = self.perceptual(video_BCTHW, reconstruction_BCTHW)
            reconstruction = reconstruction + self.config.perceptual_weight * terms[self.perceptual_name]
        terms["kl"] = kl_per_value(moments_B2CTHW, video_BCTHW.numel())
        return VAELosses(reconstruction + self.config.kl_weight * terms["kl"], terms, reconstruction)


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
