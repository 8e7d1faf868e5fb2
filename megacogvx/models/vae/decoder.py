"""Latents to pixels: the encoder's stages in reverse, every normalisation steered by the latents."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from megacogvx.models.vae.blocks import NormMaker, ResidualBlock, Upsample
from megacogvx.models.vae.causal_conv import CausalConv3d
from megacogvx.models.vae.config import VAEConfig
from megacogvx.models.vae.frames import FrameSpan
from megacogvx.models.vae.norm import SpatialNormSiLU


class DecoderStage(nn.Module):
    """Residual blocks of one width, then the doubling."""

    def __init__(self, config: VAEConfig, in_channels: int, index: int) -> None:
        """Make stage `index`, counted from the latents; the first `temporal_levels` double the frames too."""
        super().__init__()
        width, last = config.block_out_channels[-1 - index], index == len(config.block_out_channels) - 1
        widths = [in_channels, *[width] * (config.layers_per_block + 1)]
        self.blocks = nn.ModuleList(
            ResidualBlock(before, width, config.temporal_kernel_size, _norm_maker(config)) for before in widths[:-1]
        )
        self.upsample = None if last else Upsample(width, over_time=index < config.temporal_levels)


class Decoder(nn.Module):
    """Latents `[B, latent_channels, T', H', W']` to `[B, 3, T, H, W]`, about [-1, 1] (not clamped)."""

    def __init__(self, config: VAEConfig) -> None:
        """Make the stages of `config`."""
        super().__init__()
        widths, kernel = config.block_out_channels[::-1], config.temporal_kernel_size
        make_norm = _norm_maker(config)
        self.conv_in = CausalConv3d(config.latent_channels, widths[0], kernel)
        self.middle = nn.ModuleList(ResidualBlock(widths[0], widths[0], kernel, make_norm) for _ in range(2))
        self.stages = nn.ModuleList(
            DecoderStage(config, before, index) for index, before in enumerate([widths[0], *widths[:-1]])
        )
        self.norm_out = make_norm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], config.out_channels, kernel)

    def forward(self, latents_BCTHW: torch.Tensor, frames: FrameSpan) -> torch.Tensor:
        """Return the pixels of a clip, or of one chunk of it; `frames` counts latent frames."""
        x_BCTHW = self.conv_in(latents_BCTHW, frames)
        for block in self.middle:
            x_BCTHW = block(x_BCTHW, frames, latents_BCTHW)
        for stage in self.stages:  # blocks called from here, as in the encoder
            for block in stage.blocks:
                x_BCTHW = block(x_BCTHW, frames, latents_BCTHW)
            if stage.upsample is not None:
                x_BCTHW, frames = stage.upsample(x_BCTHW, frames)
        return self.conv_out(self.norm_out(x_BCTHW, frames, latents_BCTHW, overwrite=True), frames)


def _norm_maker(config: VAEConfig) -> NormMaker:
    return partial(
        SpatialNormSiLU, latent_channels=config.latent_channels, groups=config.norm_num_groups, eps=config.norm_eps
    )
