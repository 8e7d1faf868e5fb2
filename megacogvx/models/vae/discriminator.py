"""The 3D discriminator of VAE training: which patches of a clip are real (CogVideoX paper, section 2.1).

A PatchGAN (Isola et al., arXiv 1611.07004) over clips, with the hinge loss (Lim and Ye, arXiv 1705.02894). The paper
gives no sizes; these are the common ones.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import nn

from megacogvx import draws
from megacogvx.config import Section
from megacogvx.models.vae.blocks import halve_frames
from megacogvx.models.vae.causal_conv import CausalConv3d
from megacogvx.models.vae.frames import FrameSpan
from megacogvx.parallel.frame_parallel import FrameShard
from megacogvx_kernels.group_norm_moments import group_norm_moments

SLOPE = 0.2  # of the leaky ReLU where it is negative
NORM_EPS = 1e-6


class DiscriminatorConfig(Section):
    """Sizes of the discriminator, config section `discriminator` of a VAE run."""

    channels: int = Field(64, ge=1, description="of the first layer; they double with each one, up to eight times")
    layers: int = Field(3, ge=1, description="that halve height and width; patches see about 70 pixels with three")
    norm_num_groups: int = Field(32, ge=1, description="of the group normalisations")

    @model_validator(mode="after")
    def _check(self) -> DiscriminatorConfig:
        """Check that the groups divide the widths."""
        if self.channels * 2 % self.norm_num_groups:
            raise ValueError(
                f"norm_num_groups={self.norm_num_groups} must divide 2 x channels={2 * self.channels}, the width of "
                "the first normalised layer"
            )
        return self


class Discriminator(nn.Module):
    """Clip to one logit per patch; above 0 it looks real.

    Convolutions are causal and normalisations run over the whole clip, through the same two ops as in the VAE. So a
    clip may lie on several ranks here, too: they exchange halos and moments, forward and backward, and every rank gets
    the logits of its frames, equal to those that one rank with the whole clip would compute. An image is a clip of one
    frame.
    """

    def __init__(self, config: DiscriminatorConfig, in_channels: int, temporal_levels: int) -> None:
        """Make the layers.

        Args:
            config: sizes.
            in_channels: colours of a pixel.
            temporal_levels: halvings in time, at most one per layer; the VAE's, since clips are cut in latent frames.
        """
        super().__init__()
        self.config, self.temporal_levels = config, min(temporal_levels, config.layers)
        widths = [config.channels * min(2**index, 8) for index in range(config.layers + 1)]
        self.conv_in = CausalConv3d(in_channels, widths[0], 3, kernel_size=4, stride=2)
        # The last layer keeps height and width.
        self.convs = nn.ModuleList(
            CausalConv3d(before, width, 3, kernel_size=4, stride=1 if index == config.layers else 2)
            for index, (before, width) in enumerate(itertools.pairwise(widths), start=1)
        )
        self.norms = nn.ModuleList(_Norm(width, config.norm_num_groups) for width in widths[1:])
        self.conv_out = CausalConv3d(widths[-1], 1, 3, kernel_size=4)

    def forward(self, video_BCTHW: torch.Tensor, shard: FrameShard | None = None) -> torch.Tensor:
        """Return logits `[B, 1, T', H', W']`.

        Args:
            video_BCTHW: `[B, C, T, H, W]` in [-1, 1], real or reconstructed.
            shard: this rank's pixel frames; None: the whole clip is here.
        """
        frames = FrameSpan.whole(video_BCTHW.shape[2]) if shard is None else FrameSpan.of(shard)
        x_BCTHW = F.leaky_relu(self.conv_in(video_BCTHW, frames), SLOPE)
        for level, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            if level < self.temporal_levels:
                x_BCTHW, frames = halve_frames(x_BCTHW, frames), frames.halved()
            x_BCTHW = F.leaky_relu(norm(conv(x_BCTHW, frames), frames), SLOPE)
        logits_BCTHW: torch.Tensor = self.conv_out(x_BCTHW, frames)
        return logits_BCTHW

    def share(self, shard: FrameShard | None, ranks: int) -> float:
        """Return the part of a clip's logits that are here.

        Args:
            shard: this rank's pixel frames; None: each of the ranks holds all of them and counts in equal parts.
            ranks: that hold the clip.
        """
        return 1.0 / ranks if shard is None else shard.halved(self.temporal_levels).share

    def smallest_side(self) -> int:
        """Return the fewest pixels along height and along width that give a logit."""
        side = 1
        for conv in reversed([module for module in self.modules() if isinstance(module, CausalConv3d)]):
            side = (side - 1) * conv.stride[1] + conv.kernel_size[1] - 2  # a ring of zeros
        return side


class _Norm(nn.Module):
    """Group normalisation over all frames of a clip, on whatever ranks they lie."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BCTHW: torch.Tensor, frames: FrameSpan) -> torch.Tensor:
        return group_norm_moments(x_BCTHW, self.weight, self.bias, self.groups, NORM_EPS, group=frames.group)


@torch.no_grad()
def initialize_discriminator(model: Discriminator, seed: int) -> None:
    """Draw the convolutions' weights from (seed, their name) with variance 1 / inputs; biases 0, norms 1 and 0."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            drawn = draws.normal(tuple(parameter.shape), seed, f"discriminator {name}")
            parameter.copy_(drawn / math.sqrt(parameter[0].numel()))
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)


def discriminator_hinge(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """Return (mean relu(1 - real) + mean relu(1 + fake)) / 2, fp32: what the discriminator minimises."""
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())


def generator_hinge(fake_logits: torch.Tensor) -> torch.Tensor:
    """Return -mean fake logit, fp32: what the VAE minimises."""
    return -fake_logits.float().mean()


def adaptive_weight(reconstruction_norm: torch.Tensor, gan_norm: torch.Tensor, limit: float) -> torch.Tensor:
    """Return the factor that lets the GAN term pull at the decoder's last layer as the reconstruction terms do.

    min(|grad of reconstruction terms| / (|grad of GAN term| + 1e-4), limit), both with respect to the weight of the
    decoder's last layer (Esser et al., arXiv 2012.09841, equation 7).
    """
    return (reconstruction_norm / (gan_norm + 1e-4)).clamp(max=limit)
