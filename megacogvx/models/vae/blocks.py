"""Residual blocks and resampling of the VAE, the same for encoder and decoder."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from megacogvx.models.vae.causal_conv import CausalConv3d, conv_frames
from megacogvx.models.vae.frames import FrameSpan
from megacogvx.models.vae.pieces import over_frames, pieces

# Of two bf16 weights the sum would be rounded once more than either.
SUMS_OF_WEIGHTS = (torch.float32, torch.float64)
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
        x_BCTHW = over_frames(lambda x: conv_frames(self._double_and_convolve, x), x_BCTHW)
        if self.over_time:
            x_BCTHW, frames = double_frames(x_BCTHW, frames), frames.doubled()
        return x_BCTHW, frames

    def _double_and_convolve(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        if x_NCHW.dtype in SUMS_OF_WEIGHTS:
            return convolve_doubled(x_NCHW, self.conv.weight, self.conv.bias)
        y_NCHW: torch.Tensor = self.conv(F.interpolate(x_NCHW, scale_factor=2.0))
        return y_NCHW


def convolve_doubled(x_NCHW: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Copy every pixel to 2 x 2 and convolve 3 x 3, with 4 multiplications in place of 9.

    Of the three rows that a row of the result sees two are copies of one, so it sees two rows of x through a kernel in
    which two weights are summed: rows (i - 1, i) through (w0, w1 + w2) for an even row 2 i, (i, i + 1) through
    (w0 + w1, w2) for the odd one behind it; the same holds for columns. All four kinds are channels of one convolution.

    Args:
        x_NCHW: `[N, C, H, W]`.
        weight: `[C', C, 3, 3]`.
        bias: `[C']`.

    Returns:
        `[N, C', 2 H, 2 W]`, equal to the 3 x 3 convolution of the copies to rounding.
    """
    height, width = x_NCHW.shape[2:]
    rows = [_sum_pair(weight, 2, odd) for odd in (0, 1)]
    kinds = torch.cat([_sum_pair(row, 3, odd) for row in rows for odd in (0, 1)])
    y_NKHW = F.conv2d(x_NCHW, kinds, None if bias is None else bias.repeat(4), (1, 1), (1, 1))
    y_N22CHW = y_NKHW.unflatten(1, (2, 2, -1))
    out_NCH2W2 = y_NKHW.new_empty(len(x_NCHW), len(weight), height, 2, width, 2)
    for row, column in itertools.product((0, 1), repeat=2):
        y_NCHW = y_N22CHW[:, row, column, :, row : row + height, column : column + width]
        out_NCH2W2[:, :, :, row, :, column] = y_NCHW
    return out_NCH2W2.flatten(4, 5).flatten(2, 3)


def _sum_pair(weight: torch.Tensor, axis: int, first: int) -> torch.Tensor:
    """Sum the last two of three weights along an axis, or the first two."""
    w0, w1, w2 = weight.unbind(axis)
    return torch.stack([w0 + w1, w2] if first else [w0, w1 + w2], dim=axis)


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
