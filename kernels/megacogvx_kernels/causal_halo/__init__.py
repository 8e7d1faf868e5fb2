"""Frames in front of a clip, so that a convolution over time sees only the past.

A causal convolution of `size + 1` frames needs `size` frames before the first one: repeats of the first frame at the
start of a clip, the frames before it when a clip comes in chunks.
"""

from __future__ import annotations

import torch

from megacogvx_kernels.causal_halo import reference
from megacogvx_kernels.checks import require_floating, require_shape

__all__ = ["causal_halo"]


def causal_halo(x_BCTHW: torch.Tensor, size: int, previous_BCTHW: torch.Tensor | None = None) -> torch.Tensor:
    """Return x with `size` frames in front.

    Args:
        x_BCTHW: `[B, C, T, H, W]`, floating, T >= 1.
        size: frames to put in front, >= 0.
        previous_BCTHW: `[B, C, size, H, W]`, the frames before x; None: x starts the clip and its first frame is
            repeated.

    Returns:
        `[B, C, size + T, H, W]`, dtype of x; x itself when `size` is 0.
        Backward: the gradients of the repeats add up in the first frame, those of `previous_BCTHW` go to it.

    Raises:
        TypeError: x is not floating, or `previous_BCTHW` has another dtype.
        ValueError: a shape or `size` is none of the above.
    """
    require_floating("x_BCTHW", x_BCTHW)
    require_shape("x_BCTHW", x_BCTHW, (None,) * 5)
    if x_BCTHW.shape[2] < 1:
        raise ValueError(f"x_BCTHW has the shape {tuple(x_BCTHW.shape)}; it needs at least one frame")
    if size < 0:
        raise ValueError(f"size={size} must be 0 or more frames")
    if previous_BCTHW is not None:
        require_shape("previous_BCTHW", previous_BCTHW, (*x_BCTHW.shape[:2], size, *x_BCTHW.shape[3:]))
        if previous_BCTHW.dtype != x_BCTHW.dtype:
            raise TypeError(f"previous_BCTHW is {previous_BCTHW.dtype}, x_BCTHW is {x_BCTHW.dtype}; they must agree")
    return reference.causal_halo(x_BCTHW, size, previous_BCTHW)
