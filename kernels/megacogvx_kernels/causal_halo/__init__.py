"""Frames in front of a clip, so that a convolution over time sees only the past.

A causal convolution of `size + 1` frames needs `size` frames before the first one: repeats of the first frame at the
start of a clip, the frames before it when a clip comes in chunks or lies on several ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megacogvx_kernels.causal_halo import reference
from megacogvx_kernels.causal_halo.exchange import HaloExchange
from megacogvx_kernels.checks import require_count, require_floating, require_one_device, require_shape

__all__ = ["HaloExchange", "causal_halo", "start_halo"]


def causal_halo(
    x_BCTHW: torch.Tensor,
    size: int,
    previous_BCTHW: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Return x with `size` frames in front.

    Args:
        x_BCTHW: `[B, C, T, H, W]`, floating, of at least one frame.
        size: frames to put in front, >= 0.
        previous_BCTHW: `[B, C, size, H, W]`, the frames before x; None: x starts the clip and its first frame is
            repeated.
        group: ranks that hold the clip, each some frames of it in the order of the ranks; T may differ between them,
            the rest of the shape and `size` may not. Every rank of the group makes this call, and takes part in its
            backward pass if any does. None: this process holds all frames.

    Returns:
        `[B, C, size + T, H, W]`, dtype of x; x itself when `size` is 0.
        Backward: the gradients of the repeats add up in the first frame, those of `previous_BCTHW` go to it, and
        those of frames from other ranks travel back to their owners, where they are added.

    Raises:
        TypeError: x is not floating, `size` no integer, or `previous_BCTHW` has another dtype.
        ValueError: a shape, device or `size` is none of the above, or previous frames and a group are both given.
    """
    _check(x_BCTHW, size)
    if previous_BCTHW is not None:
        if group is not None:
            raise ValueError("previous_BCTHW and group exclude each other: a chunk lies on one rank")
        require_shape("previous_BCTHW", previous_BCTHW, (*x_BCTHW.shape[:2], size, *x_BCTHW.shape[3:]))
        if previous_BCTHW.dtype != x_BCTHW.dtype:
            raise TypeError(f"previous_BCTHW is {previous_BCTHW.dtype}, x_BCTHW is {x_BCTHW.dtype}; they must agree")
        require_one_device(x_BCTHW=x_BCTHW, previous_BCTHW=previous_BCTHW)
    if size and group is not None and group.size() > 1:
        return torch.cat([start_halo(x_BCTHW, size, group).wait(), x_BCTHW], dim=2)
    return reference.causal_halo(x_BCTHW, size, previous_BCTHW)


def start_halo(x_BCTHW: torch.Tensor, size: int, group: dist.ProcessGroup) -> HaloExchange:
    """Start the exchange that `causal_halo` makes; `wait()` of the result returns the halo `[B, C, size, H, W]`.

    Between the two calls the messages are on their way: compute there what needs no halo. The backward pass overlaps
    the same work. Each rank sends `size` frames to the next one, and their gradient back.

    Args:
        x_BCTHW, size, group: as in `causal_halo`; `size` is at least 1.

    Raises:
        TypeError, ValueError: as `causal_halo`.
    """
    _check(x_BCTHW, size)
    if size == 0:
        raise ValueError("size=0 leaves nothing to exchange")
    return HaloExchange(x_BCTHW, size, group)


def _check(x_BCTHW: torch.Tensor, size: int) -> None:
    require_floating("x_BCTHW", x_BCTHW)
    require_shape("x_BCTHW", x_BCTHW, (None,) * 5)
    if not x_BCTHW.numel():
        raise ValueError(
            f"x_BCTHW has the shape {tuple(x_BCTHW.shape)}; it needs at least one frame, and one value in it"
        )
    require_count("size", size)
