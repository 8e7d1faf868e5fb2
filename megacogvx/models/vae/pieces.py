"""Without a graph nothing but input and output of a layer has to be held: layers then run some frames at a time.

The numbers are those of the whole, to rounding: each frame is computed from the same frames.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

# Of what a convolution reads at a time: on a processor so small that its copies in other layouts don't count, on a GPU
# so large that one call fills it (three frames of 480 x 720 with 128 channels in bf16).
PIECE_BYTES = {"cpu": 2**24, "cuda": 2**28}


def pieces(x_BCTHW: torch.Tensor, first: int = 0, together: int = 1) -> list[tuple[int, int]]:
    """Cut the frames from `first` on, if any, into (start, stop) of even sizes, at most `PIECE_BYTES` or one run.

    A run of `together` frames, counted from the last one, isn't cut; what is left over starts the first piece.
    """
    frames, size = x_BCTHW.shape[2], PIECE_BYTES["cpu" if x_BCTHW.device.type == "cpu" else "cuda"]
    step = max(1, size // max(1, together * x_BCTHW[:, :, 0].nbytes))
    runs = -(-(frames - first) // together)
    count = -(-runs // step)
    stops = [runs * number // max(1, count) for number in range(count + 1)]
    return list(itertools.pairwise(max(first, frames - together * (runs - stop)) for stop in stops))


def over_frames(compute: Callable[[torch.Tensor], torch.Tensor], x_BCTHW: torch.Tensor) -> torch.Tensor:
    """Apply what sees every frame by itself, `[B, C, T, H, W]` to `[B, C', T, H', W']`."""
    places = pieces(x_BCTHW)
    if torch.is_grad_enabled() or len(places) == 1:
        return compute(x_BCTHW)
    out_BCTHW = None
    for start, stop in places:
        y_BCTHW = compute(x_BCTHW[:, :, start:stop])
        if out_BCTHW is None:
            shape = list(y_BCTHW.shape)
            shape[2] = x_BCTHW.shape[2]
            out_BCTHW = y_BCTHW.new_empty(shape)
        out_BCTHW[:, :, start:stop] = y_BCTHW
        del y_BCTHW  # else it would live on beside the next one
    assert out_BCTHW is not None, tuple(x_BCTHW.shape)
    return out_BCTHW
