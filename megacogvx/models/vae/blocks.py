"""Residual blocks and resampling of the VAE, the same for encoder and decoder."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from megacogvx.models.vae.causal_conv import CausalConv3d, conv_frames
from megacogvx.models.vae.frames import FrameSpan
from megacogvx.models.vae.pieces import over_frames, pieces

NormMaker = Callable[[int], nn.Module]  # channels -> a normalisation with its SiLU


class ResidualBlock(nn.Module):
    """x + conv(norm(conv(norm(x)))); a 1 x 1 x 1 convolution on the shortcut where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, kernel_frames: int, make_norm: NormMaker) -> None:
        """Make the block; `make_norm` gives the encoder's or the decoder's normalisation."""
        super().__init__()
        self.norm1 = make_norm(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, kernel_frames)
        self.norm2 = make_norm(out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, kernel_frames)
        same = in_channels == out_channels
        self.conv_shortcut: nn.Module = nn.Identity() if same else nn.Conv3d(in_channels, out_channels, 1)

    def forward(
        self, x_BCTHW: torch.Tensor, frames: FrameSpan, latents_BCTHW: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return `[B, out_channels, T, H, W]`; `latents_BCTHW` steers the decoder's normalisation."""
        h_BCTHW = self.conv1(self.norm1(x_BCTHW, frames, latents_BCTHW), frames, overwrite=True)
        h_BCTHW = self.norm2(h_BCTHW, frames, latents_BCTHW, overwrite=True)
        h_BCTHW = self.conv2(h_BCTHW, frames, overwrite=True)
        if torch.is_grad_enabled():
            return h_BCTHW + self.conv_shortcut(x_BCTHW)
        for start, stop in pieces(x_BCTHW):
            h_BCTHW[:, :, start:stop] += self.conv_shortcut(x_BCTHW[:, :, start:stop])
        return h_BCTHW


class Downsample(nn.Module):
    """Halve height and width with a strided convolution per frame, and the frames, if asked, by averaging pairs."""

    def __init__(self, channels: int, over_time: bool) -> None:
        """Make the layer; `over_time` halves the frames too."""
        super().__init__()
        self.over_time = over_time
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCTHW: torch.Tensor, frames: FrameSpan) -> tuple[torch.Tensor, FrameSpan]:
        """Return the halved features and their span."""
        if self.over_time:
            x_BCTHW, frames = halve_frames(x_BCTHW, frames), frames.halved()
        # Zeros right and below only, as the released weights expect.
        return over_frames(lambda x: conv_frames(self.conv, F.pad(x, (0, 1, 0, 1))), x_BCTHW), frames


class Upsample(nn.Module):
    """Double height and width, smooth with a convolution per frame, and, if asked, copy every frame.

    The convolution doesn't see time, so it runs before the copies are made: the same numbers, half the work.
    """

    def __init__(self, channels: int, over_time: bool) -> None:
        """Make the layer; `over_time` doubles the frames too."""
        super().__init__()
        self.over_time = over_time
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCTHW: torch.Tensor, frames: FrameSpan) -> tuple[torch.Tensor, FrameSpan]:
        """Return the doubled features and their span."""
        x_BCTHW = over_frames(lambda x: conv_frames(self.conv, F.interpolate(x, scale_factor=(1.0, 2.0, 2.0))), x_BCTHW)
        if self.over_time:
            x_BCTHW, frames = double_frames(x_BCTHW, frames), frames.doubled()
        return x_BCTHW, frames


def halve_frames(x_BCTHW: torch.Tensor, frames: FrameSpan) -> torch.Tensor:
    """Average pairs of frames; of an odd count the first frame stays as it is."""
    assert x_BCTHW.shape[2] == frames.count, (tuple(x_BCTHW.shape), frames)
    start = int(frames.first_alone)
    if frames.count == start:
        return x_BCTHW
    pairs_BCTHW = x_BCTHW[:, :, start:].unflatten(2, (-1, 2)).mean(dim=3)
    return torch.cat([x_BCTHW[:, :, :1], pairs_BCTHW], dim=2) if start else pairs_BCTHW


def double_frames(x_BCTHW: torch.Tensor, frames: FrameSpan) -> torch.Tensor:
    """Copy every frame once; of an odd count the first frame stays single."""
    assert x_BCTHW.shape[2] == frames.count, (tuple(x_BCTHW.shape), frames)
    return x_BCTHW.repeat_interleave(2, dim=2)[:, :, int(frames.first_alone) :]
