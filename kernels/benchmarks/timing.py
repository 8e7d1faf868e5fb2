"""Time a function on the GPU: events, medians, and buffers that rotate so that no run finds its inputs in the cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

L2_BYTES = 64 * 2**20  # of the largest card; the rotating inputs are four times as large


@dataclass(frozen=True)
class Timed:
    """One measurement: median milliseconds, and the bytes that had to be moved (0: not counted)."""

    milliseconds: float
    least_bytes: float = 0.0

    def share_of(self, bandwidth: float) -> float:
        """Return the share of `bandwidth` (bytes per second) that the least traffic came to."""
        return self.least_bytes / (self.milliseconds * 1e-3) / bandwidth


def copies_needed(inputs: Sequence[torch.Tensor]) -> int:
    """Return how many sets of inputs are larger than four caches together."""
    size = sum(x.numel() * x.element_size() for x in inputs)
    return min(16, max(1, -(-4 * L2_BYTES // max(size, 1))))


def time_of(
    function: Callable[..., Any], inputs: Sequence[torch.Tensor], least_bytes: float = 0.0, repeats: int = 15
) -> Timed:
    """Call `function(*inputs)` on rotating copies of the inputs and return the median time of a call.

    Args:
        function: what is timed; its results are dropped.
        inputs: on the GPU.
        least_bytes: each input read once, each output written once.
        repeats: after three calls that aren't counted.
    """
    sets = [tuple(inputs), *(tuple(x.clone() for x in inputs) for _ in range(copies_needed(inputs) - 1))]
    found = []
    for repeat in range(repeats + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function(*sets[repeat % len(sets)])
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end))
    return Timed(statistics.median(found[3:]), least_bytes)


def copy_bandwidth() -> float:
    """Return bytes per second, read and written, of a copy of 2 GiB within the card's memory."""
    source = torch.empty(2**30, dtype=torch.int16, device="cuda").random_()
    target = torch.empty_like(source)
    timed = time_of(lambda x, y: y.copy_(x), (source, target), 2 * source.numel() * 2)
    return timed.least_bytes / (timed.milliseconds * 1e-3)
