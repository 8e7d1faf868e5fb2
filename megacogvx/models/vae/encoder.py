"""Pixels to moments: stages of residual blocks, a halving between stages (CogVideoX paper, section 2.1)."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from megacogvx.models.vae.blocks import Downsample, ResidualBlock
from megacogvx.models.vae.causal_conv import CausalConv3d
from megacogvx.models.vae.config import VAEConfig
from megacogvx.models.vae.frames import FrameSpan
from megacogvx.models.vae.norm import GroupNormSiLU


class EncoderStage(nn.Module):
    """Residual blocks of one width, then the halving."""

    def __init__(self, config: VAEConfig, in_channels: int, index: int) -> None:
        """Make stage `index`; the first `temporal_levels` stages halve the frames too, the last stage nothing."""
        super().__init__()
        width, last = config.block_out_channels[index], index == len(config.block_out_channels) - 1
        make_norm = partial(GroupNormSiLU, groups=config.norm_num_groups, eps=config.norm_eps)
        widths = [in_channels, *[width] * config.layers_per_block]
        self.blocks = nn.ModuleList(
            ResidualBlock(before, width, config.temporal_kernel_size, make_norm) for before in widths[:-1]
        )
        self.downsample = None if last else Downsample(width, over_time=index < config.temporal_levels)


class Encoder(nn.Module):
    """`[B, 3, T, H, W]` in [-1, 1] to moments `[B, 2 * latent_channels, T', H', W']`: means, then log variances."""

    def __init__(self, config: VAEConfig) -> None:
        """Make the stages of `config`."""
        super().__init__()
        widths, kernel = config.block_out_channels, config.temporal_kernel_size
        make_norm = partial(GroupNormSiLU, groups=config.norm_num_groups, eps=config.norm_eps)
        self.conv_in = CausalConv3d(config.in_channels, widths[0], kernel)
        self.stages = nn.ModuleList(
            EncoderStage(config, before, index) for index, before in enumerate([widths[0], *widths[:-1]])
        )
        self.middle = nn.ModuleList(ResidualBlock(widths[-1], widths[-1], kernel, make_norm) for _ in range(2))
        self.norm_out = make_norm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * config.latent_channels, kernel)

    def forward(self, video_BCTHW: torch.Tensor, frames: FrameSpan) -> torch.Tensor:
        """Return the moments of a clip, or of one chunk of it."""
        x_BCTHW = self.conv_in(video_BCTHW, frames)
        for stage in self.stages:  # blocks called from here: a stage's own forward would hold its input to its end
            for block in stage.blocks:
                x_BCTHW = block(x_BCTHW, frames)
            if stage.downsample is not None:
                x_BCTHW, frames = stage.downsample(x_BCTHW, frames)
        for block in self.middle:
            x_BCTHW = block(x_BCTHW, frames)
        return self.conv_out(self.norm_out(x_BCTHW, frames, overwrite=True), frames)
