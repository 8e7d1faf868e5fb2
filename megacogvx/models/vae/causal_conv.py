"""The causal 3D convolution: a frame sees itself and the frames before it (CogVideoX paper, section 2.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megacogvx.models.vae.frames import FrameSpan
from megacogvx_kernels.causal_halo import causal_halo, start_halo


class CausalConv3d(nn.Conv3d):
    """A convolution over the last `kernel_frames` frames, in space one ring of zeros around."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_frames: int, kernel_size: int = 3, stride: int = 1
    ) -> None:
        """Make the convolution.

        Args:
            in_channels, out_channels: widths.
            kernel_frames: 3, or 1 for a model that codes every frame by itself.
            kernel_size, stride: in space, in pixels.
        """
        kernel, strides = (kernel_frames, kernel_size, kernel_size), (1, stride, stride)
        super().__init__(in_channels, out_channels, kernel, strides, padding=(0, 1, 1))
        self.halo_frames = kernel_frames - 1

    def forward(self, x_BCTHW: torch.Tensor, frames: FrameSpan) -> torch.Tensor:  # type: ignore[override]
        """Return `[B, out_channels, T, H', W']`.

        Where the clip lies on several ranks, the frames that see this rank's frames alone are computed while the halo
        is on its way.
        """
        if self.halo_frames and frames.group is not None and frames.count > self.halo_frames:
            exchange = start_halo(x_BCTHW, self.halo_frames, frames.group)
            interior_BCTHW = self._convolve(x_BCTHW)
            edge_BCTHW = torch.cat([exchange.wait(), x_BCTHW[:, :, : self.halo_frames]], dim=2)
            return torch.cat([self._convolve(edge_BCTHW), interior_BCTHW], dim=2)
        halos = frames.halos if self.halo_frames else None
        padded_BCTHW = causal_halo(x_BCTHW, self.halo_frames, halos.previous() if halos else None, frames.group)
        if halos:
            halos.keep(padded_BCTHW, self.halo_frames)
        return self._convolve(padded_BCTHW)

    def _convolve(self, padded_BCTHW: torch.Tensor) -> torch.Tensor:
        """Return the `halo_frames` fewer frames for which all they see is there."""
        return F.conv3d(padded_BCTHW, self.weight, self.bias, self.stride, self.padding)


def conv_frames(conv: nn.Conv2d, x_BCTHW: torch.Tensor) -> torch.Tensor:
    """Apply a 2D convolution to every frame."""
    batch, channels, frames, height, width = x_BCTHW.shape
    y = conv(x_BCTHW.transpose(1, 2).reshape(batch * frames, channels, height, width))
    return y.reshape(batch, frames, *y.shape[1:]).transpose(1, 2)
