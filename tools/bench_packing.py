#!/usr/bin/env python
"""Compare ways to put samples into packs: fill, balance of cost, CPU time; on the synthetic length distribution.

naive    next fit: samples in order, a new pack when one doesn't fit any more
ffd      first fit, longest first, within a window of one step
planner  megacogvx/data/planner.py

For the figures of a cluster: python tools/bench_packing.py --packs 64 --steps 20     (a minute)
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.table import Table

from megacogvx.data.corpus import CorpusColumns, DataConfig, Group
from megacogvx.data.order import SampleOrder
from megacogvx.data.planner import PackPlan
from megacogvx.log import progress
from megacogvx.testing import length_distribution as lengths

WARM_UP = 2  # steps, before the buffer's age distribution has settled
Packs = list[list[int]]


def columns_of(stage: str, count: int, real_text: bool) -> CorpusColumns:
    """Return index columns of `count` synthetic samples, one latent row per frame, to be used with patch (1, 1, 1)."""
    tokens, per_frame, frames = lengths.sample_lengths(stage, count, real_text=real_text)
    text = tokens - per_frame * frames
    ids, one = np.arange(count).astype(np.uint64), np.ones_like(frames)
    return CorpusColumns(ids, frames, one, per_frame, text, (Group(0, count, 1),))


def naive(stream: list[int], size: list[int], packs: int, budget: int) -> tuple[Packs, int]:
    """Return a step's packs by next fit, and how many samples of `stream` they took."""
    result: Packs = [[]]
    room = budget
    for taken, sample in enumerate(stream):
        if size[sample] > room:
            if len(result) == packs:
                return result, taken
            result.append([])
            room = budget
        result[-1].append(sample)
        room -= size[sample]
    raise AssertionError("the stream is too short for a step")


def first_fit_decreasing(stream: list[int], size: list[int], packs: int, budget: int) -> tuple[Packs, int]:
    """Return a step's packs: a step's worth of samples, longest first, each into the first pack with room.

    What didn't fit is lost for the comparison (a real loader would keep it); this favours the method a little.
    """
    taken, tokens = 0, 0
    while tokens < packs * budget:
        tokens += size[stream[taken]]
        taken += 1
    result: Packs = [[] for _ in range(packs)]
    room = [budget] * packs
    for sample in sorted(stream[:taken], key=lambda sample: -size[sample]):
        place = next((place for place in range(packs) if size[sample] <= room[place]), None)
        if place is not None:
            result[place].append(sample)
            room[place] -= size[sample]
    return result, taken


def streamed(method: Callable[..., tuple[Packs, int]], plan: PackPlan, steps: int) -> list[Packs]:
    """Run `method` over the plan's own sample order."""
    order = SampleOrder(plan.columns.groups, plan.seed)
    packs, budget = plan.config.packs_per_step, plan.config.tokens_per_pack
    size, position = plan.lengths.tolist(), 0
    result: list[Packs] = []
    need = int(packs * budget / plan.lengths.mean() * 2) + 1000
    for _ in range(steps):
        step, taken = method(order.at(np.arange(position, position + need)).tolist(), size, packs, budget)
        result.append(step)
        position += taken
    return result


def planned(plan: PackPlan, steps: int) -> list[Packs]:
    """Run the planner."""
    return [[list(pack) for pack in plan.step(number)] for number in progress(range(steps), "plan")]


def measure(steps: list[Packs], plan: PackPlan, seconds: float) -> list[str]:
    """Return the table's figures: fill, mean and worst max/mean cost, microseconds of CPU a sample."""
    budget, packs = plan.config.tokens_per_pack, plan.config.packs_per_step
    fill, ratio = [], []
    for step in steps[WARM_UP:]:
        cost = np.array([lengths.cost(plan.lengths[pack]).sum() for pack in step])
        fill.append(sum(int(plan.lengths[pack].sum()) for pack in step) / (packs * budget))
        ratio.append(cost.max() / cost.mean())
    samples = sum(len(pack) for step in steps for pack in step)
    return [f"{np.mean(fill):.2%}", f"{np.mean(ratio):.4f}", f"{max(ratio):.4f}", f"{seconds / samples * 1e6:.1f}"]


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", default=["stage1", "stage2", "stage3"], choices=list(lengths.STAGES))
    parser.add_argument("--packs", nargs="+", type=int, default=[8], help="packs per step")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--samples", type=int, default=50_000, help="samples in the synthetic corpus")
    parser.add_argument("--buffer", type=float, default=2.0, help="the planner's buffer, in steps")
    parser.add_argument("--real-text", action="store_true", help="20-226 text tokens instead of 226")
    arguments = parser.parse_args()
    table = Table(title=f"Packing, {arguments.steps} steps (the first {WARM_UP} not counted)")
    for name in ("stage", "packs", "method", "fill", "max/mean cost", "worst step", "CPU us/sample"):
        table.add_column(name, justify="left" if name in ("stage", "method") else "right")
    for stage in arguments.stages:
        columns = columns_of(stage, arguments.samples, arguments.real_text)
        for packs in arguments.packs:
            config = DataConfig(
                paths=("synthetic",), tokens_per_pack=lengths.STAGES[stage]["budget"], packs_per_step=packs,
                buffer=arguments.buffer,
            )  # fmt: skip
            cost = (lengths.LINEAR_SECONDS_PER_TOKEN, lengths.ATTENTION_SECONDS_PER_TOKEN_SQUARED)
            plan = PackPlan(columns, config, 0, (1, 1, 1), cost)
            for name in ("naive", "ffd", "planner"):
                start = time.process_time()
                if name == "planner":
                    steps = planned(plan, arguments.steps)
                else:
                    steps = streamed(naive if name == "naive" else first_fit_decreasing, plan, arguments.steps)
                table.add_row(stage, str(packs), name, *measure(steps, plan, time.process_time() - start))
    Console().print(table)


if __name__ == "__main__":
    main()
