"""Which rank is slow: each rank's own seconds against the median of all, over windows of steps.

Own seconds are the wait for the rank's own loader and the forward passes, without the exchanges after them, in which
the fast wait for the slow. Ranks that share a pack (tensor, context) wait for each other in the forward pass as well,
so a slow one shows as its whole replica.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median, median_low
from typing import Any

import torch

PATIENCE = 2  # windows in a row


class Stragglers:
    """Finds slow ranks from the seconds of all; the same on every rank.

    Args:
        factor: times the median that counts as slow.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self._slow_for: dict[int, int] = {}

    def add(self, seconds: list[float]) -> dict[int, float]:
        """Take one window's seconds by rank; return {rank: times the median} of those slow for long enough."""
        usual = median_low(seconds)  # of two ranks, the faster one
        times = {rank: value / max(usual, 1e-9) for rank, value in enumerate(seconds)}
        slow = {rank: value for rank, value in times.items() if value > self.factor}
        self._slow_for = {rank: self._slow_for.get(rank, 0) + 1 for rank in slow}
        return {rank: slow[rank] for rank, windows in self._slow_for.items() if windows >= PATIENCE}


class OwnSeconds:
    """Measures this rank's own seconds of each step.

    Args:
        forward_step: what is timed; call this object instead.
        device: on a GPU the passes are timed by events, since their launch takes no time.
        clock: seconds.
    """

    def __init__(
        self, forward_step: Callable[..., Any], device: torch.device, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.forward_step, self.clock, self._on_gpu = forward_step, clock, device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._steps: list[float] = []

    def __call__(self, microbatches: Iterator[Any], model: torch.nn.Module) -> Any:
        """Do the forward step of one microbatch."""
        if self._on_gpu:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            result = self.forward_step(microbatches, model)
            end.record()
            self._events.append((start, end))
            return result
        began = self.clock()
        result = self.forward_step(microbatches, model)
        self._seconds += self.clock() - began
        return result

    def end_step(self, data_wait: float) -> None:
        """Close a step; the GPU has to be done with it."""
        passes = self._seconds + sum(start.elapsed_time(end) for start, end in self._events) / 1e3
        self._steps.append(data_wait + passes)
        self._seconds, self._events = 0.0, []

    def take_window(self) -> float:
        """Return the median step of those since the last call."""
        seconds, self._steps = median(self._steps), []
        return seconds
