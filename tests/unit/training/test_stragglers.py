"""Slow ranks are named from seconds that an injected clock gives."""

from __future__ import annotations

import torch

from megacogvx import draws
from megacogvx.training.stragglers import OwnSeconds, Stragglers

CPU = torch.device("cpu")


class Clock:
    """A clock that goes when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Rank:
    """One rank's clock and its measured forward steps."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.seconds = 1.0
        self.own = OwnSeconds(self._work, CPU, self.clock)

    def _work(self, microbatches, model):
        self.clock.now += self.seconds

    def step(self, seconds: float) -> None:
        self.seconds = seconds / 2
        self.own(iter(()), None)
        self.own(iter(()), None)
        self.clock.now += 100.0  # the reduction of gradients, in which all wait
        self.own.end_step(0.0)


def run(steps: int, slow: int | None, ranks: int, window: int = 5) -> tuple[int | None, int]:
    """Return (the step at which `slow` was named, how often another was)."""
    everyone, stragglers, named, wrong = [Rank() for _ in range(ranks)], Stragglers(2.0), None, 0
    noise = (1 + 0.2 * draws.normal((steps, ranks), 0, "seconds").clamp(-2, 2)).tolist()
    for step in range(steps):
        for rank, one in enumerate(everyone):
            one.step(noise[step][rank] * (3.0 if rank == slow else 1.0))
        if (step + 1) % window == 0:
            for rank in stragglers.add([one.own.take_window() for one in everyone]):
                wrong += rank != slow
                named = step if rank == slow and named is None else named
    return named, wrong


def test_a_rank_three_times_slower_is_named_within_twenty_steps():
    for ranks in (2, 3, 8):
        for slow in (0, ranks - 1):
            named, wrong = run(40, slow, ranks)
            assert named is not None and named < 20 and wrong == 0


def test_two_hundred_clean_steps_name_nobody():
    assert run(200, None, 4) == (None, 0)


def test_one_slow_window_is_not_enough():
    stragglers = Stragglers(2.0)
    assert stragglers.add([1.0, 5.0, 1.0]) == {}
    assert stragglers.add([1.0, 1.0, 1.0]) == {}
    assert stragglers.add([1.0, 5.0, 1.0]) == {}
    assert stragglers.add([1.0, 4.0, 1.0]) == {1: 4.0}


def test_the_wait_for_data_counts_as_its_own():
    rank = Rank()
    for wait in (1.0, 7.0, 7.0):
        rank.own(iter(()), None)
        rank.own.end_step(wait)
    assert rank.own.take_window() == 8.0
