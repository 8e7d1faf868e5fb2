"""The causal 3D convolution: a frame sees itself and the frames before it (CogVideoX paper, section 2.1)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from megacogvx.models.vae.frames import FrameSpan
from megacogvx.models.vae.pieces import pieces
from megacogvx.models.vae.winograd import convolve_pairs, pair_kernels, pays
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

    def forward(  # type: ignore[override]
        self, x_BCTHW: torch.Tensor, frames: FrameSpan, overwrite: bool = False
    ) -> torch.Tensor:
        """Return `[B, out_channels, T, H', W']`.

        Where the clip lies on several ranks, the frames that see this rank's frames alone are computed while the halo
        is on its way.

        Args:
            x_BCTHW: this rank's frames.
            frames: which they are.
            overwrite: nobody needs x any more; without a graph the result may take its place.
        """
        if not torch.is_grad_enabled():
            return self._without_graph(x_BCTHW, frames, overwrite)
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

    def _without_graph(self, x_BCTHW: torch.Tensor, frames: FrameSpan, overwrite: bool) -> torch.Tensor:
        """Convolve some frames at a time, the last ones first: a result then takes the place of what only it sees."""
        size, count = self.halo_frames, x_BCTHW.shape[2]
        shared = size > 0 and frames.group is not None and frames.group.size() > 1
        halo = (self._shared_halo if shared else self._own_halo)(x_BCTHW, frames, overwrite)
        in_pairs = count > 1 and self.stride == (1, 1, 1) and pays(x_BCTHW, self.weight)
        convolve = self._pairs_convolution() if in_pairs else self._convolve
        places = pieces(x_BCTHW, min(size, count) if shared else 0, 2 if in_pairs else 1)[::-1]
        places += [(0, min(size, count))] if shared else []
        out_BCTHW = x_BCTHW if overwrite and self._keeps_shape else None
        for start, stop in places:
            seen_BCTHW = x_BCTHW[:, :, max(start - size, 0) : stop]
            if start < size:
                seen_BCTHW = torch.cat([halo()[:, :, start:], seen_BCTHW], dim=2)
            y_BCTHW = convolve(seen_BCTHW)
            if len(places) == 1:
                return y_BCTHW
            if out_BCTHW is None:
                out_BCTHW = y_BCTHW.new_empty(*y_BCTHW.shape[:2], count, *y_BCTHW.shape[3:])
            out_BCTHW[:, :, start:stop] = y_BCTHW
            del seen_BCTHW, y_BCTHW  # else they would live on beside the next ones
        assert out_BCTHW is not None, tuple(x_BCTHW.shape)
        return out_BCTHW

    def _pairs_convolution(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return `_convolve` at two thirds of its products."""
        return partial(convolve_pairs, weight=self.weight, kernels=pair_kernels(self.weight), bias=self.bias)

    @property
    def _keeps_shape(self) -> bool:
        return self.in_channels == self.out_channels and self.stride == (1, 1, 1)

    def _own_halo(self, x_BCTHW: torch.Tensor, frames: FrameSpan, overwrite: bool) -> Callable[[], torch.Tensor]:
        """Return what gives the frames before this rank's, after keeping the last ones for the next chunk."""
        halos = frames.halos if self.halo_frames else None
        previous = halos.previous() if halos else None
        halo_BCTHW = x_BCTHW[:, :, :1].expand(-1, -1, self.halo_frames, -1, -1) if previous is None else previous
        if halos:
            last_BCTHW = x_BCTHW[:, :, -self.halo_frames :]
            if last_BCTHW.shape[2] < self.halo_frames:
                last_BCTHW = torch.cat([halo_BCTHW, last_BCTHW], dim=2)
            halos.keep(last_BCTHW, self.halo_frames)
        return lambda: halo_BCTHW

    def _shared_halo(self, x_BCTHW: torch.Tensor, frames: FrameSpan, overwrite: bool) -> Callable[[], torch.Tensor]:
        """Start the exchange, and return what waits for it; frames on their way mustn't be overwritten."""
        assert frames.group is not None, frames
        tail = x_BCTHW[:, :, -self.halo_frames :].clone() if overwrite else x_BCTHW
        exchange = start_halo(tail, self.halo_frames, frames.group)

        def wait() -> torch.Tensor:
            halo_BCTHW = exchange.wait()
            # The exchange repeats the first frame that it was given.
            return x_BCTHW[:, :, :1].expand_as(halo_BCTHW) if frames.start == 0 else halo_BCTHW

        return wait

    def _convolve(self, padded_BCTHW: torch.Tensor) -> torch.Tensor:
        """Return the `halo_frames` fewer frames for which all they see is there."""
        return F.conv3d(padded_BCTHW, self.weight, self.bias, self.stride, self.padding)


def conv_frames(conv: Callable[[torch.Tensor], torch.Tensor], x_BCTHW: torch.Tensor) -> torch.Tensor:
    """Apply a 2D convolution to every frame."""
    batch, channels, frames, height, width = x_BCTHW.shape
    y = conv(x_BCTHW.transpose(1, 2).reshape(batch * frames, channels, height, width))
    return y.reshape(batch, frames, *y.shape[1:]).transpose(1, 2)
