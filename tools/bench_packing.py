#!/usr/bin/env python
"""Compare ways to put samples into packs: fill, balance of cost, CPU time; on the synthetic length distribution.

naive    next fit: samples in order, a new pack when one doesn't fit any more
ffd      first fit, longest first, within a window of one step
planner  megacogvx/data/planner.py

For the figures of a cluster: python tools/bench_packing.py --packs 8 64 512 --svg packing.svg     (a minute)
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from megacogvx.data.config import DataConfig
from megacogvx.data.corpus import CorpusColumns, Group
from megacogvx.data.order import SampleOrder
from megacogvx.data.planner import PackPlan
from megacogvx.log import progress
from megacogvx.testing import length_distribution as lengths

METHODS = ("naive", "ffd", "planner")
WARM_UP = 2  # steps, before the buffer's age distribution has settled
Packs = list[list[int]]


def columns_of(stage: str, count: int, real_text: bool, seed: int) -> CorpusColumns:
    """Return index columns of `count` synthetic samples, one latent row per frame, to be used with patch (1, 1, 1)."""
    tokens, per_frame, frames = lengths.sample_lengths(stage, count, seed=seed, real_text=real_text)
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


@dataclass(frozen=True)
class Row:
    """The figures of one method: means over the counted steps, and the worst of them.

    Attributes:
        fill: share of the budget that samples use; `least_fill` of the emptiest step.
        ratio: costliest pack of a step over the mean of its packs; `worst_ratio` of the worst step.
        microseconds: CPU time a sample.
        costs: of each pack of the last step over their mean, ascending.
    """

    stage: str
    packs: int
    method: str
    fill: float
    least_fill: float
    ratio: float
    worst_ratio: float
    microseconds: float
    costs: np.ndarray


def measure(steps: list[Packs], plan: PackPlan, seconds: float, stage: str, method: str) -> Row:
    """Return the figures of `steps`, the first `WARM_UP` of them not counted."""
    budget, packs = plan.config.tokens_per_pack, plan.config.packs_per_step
    fill, ratio = [], []
    for step in steps[WARM_UP:]:
        cost = np.array([lengths.cost(plan.lengths[pack]).sum() for pack in step])
        fill.append(sum(int(plan.lengths[pack].sum()) for pack in step) / (packs * budget))
        ratio.append(cost.max() / cost.mean())
    samples = sum(len(pack) for step in steps for pack in step)
    return Row(
        stage, packs, method, float(np.mean(fill)), min(fill), float(np.mean(ratio)), max(ratio),
        seconds / samples * 1e6, np.sort(cost / cost.mean()),
    )  # fmt: skip


def compare(stage: str, packs: int, seed: int, arguments: argparse.Namespace) -> list[Row]:
    """Run the three methods on one stage."""
    columns = columns_of(stage, arguments.samples, arguments.real_text, seed)
    config = DataConfig(
        paths=("synthetic",), tokens_per_pack=lengths.STAGES[stage]["budget"], packs_per_step=packs,
        buffer=arguments.buffer,
    )  # fmt: skip
    cost = (lengths.LINEAR_SECONDS_PER_TOKEN, lengths.ATTENTION_SECONDS_PER_TOKEN_SQUARED)
    plan = PackPlan(columns, config, seed, (1, 1, 1), cost)
    rows = []
    for method in METHODS:
        gc.collect()  # else the first full collection, of what the imports left, falls on whichever method is at work
        start = time.process_time()
        if method == "planner":
            steps = planned(plan, arguments.steps)
        else:
            steps = streamed(naive if method == "naive" else first_fit_decreasing, plan, arguments.steps)
        rows.append(measure(steps, plan, time.process_time() - start, stage, method))
    return rows


def draw(rows: list[Row], path: Path) -> None:
    """Draw each pack's cost over the mean of its step, sorted: a row of panels a stage, a column a number of packs."""
    stages, packs = (list(dict.fromkeys(values)) for values in ([r.stage for r in rows], [r.packs for r in rows]))
    figure = Figure(figsize=(3.8 * len(packs), 2.9 * len(stages)), layout="constrained")
    panels = figure.subplots(len(stages), len(packs), squeeze=False)
    for row in rows:
        axes = panels[stages.index(row.stage)][packs.index(row.packs)]
        label = f"{row.method}: fill {row.fill:.2%}, costliest {row.ratio:.3f}"
        axes.plot(np.linspace(0, 1, len(row.costs)), row.costs, label=label)
        budget = lengths.STAGES[row.stage]["budget"]
        axes.set(title=f"{budget // 1000}k tokens, {row.packs} packs", xlabel="packs of a step, sorted")
        axes.set(ylabel="cost / mean")
        axes.legend(fontsize=7, loc="upper left")
    figure.savefig(path)


def main() -> None:
    """Print the table, and draw the picture where --svg names one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", default=["stage1", "stage2", "stage3"], choices=list(lengths.STAGES))
    parser.add_argument("--packs", nargs="+", type=int, default=[8], help="packs per step")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of samples and order")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--samples", type=int, default=50_000, help="samples in the synthetic corpus")
    parser.add_argument("--buffer", type=float, default=2.0, help="the planner's buffer, in steps")
    parser.add_argument("--real-text", action="store_true", help="20-226 text tokens instead of 226")
    parser.add_argument("--svg", type=Path, help="also draw the costs of the first seed's packs here (or .png)")
    arguments = parser.parse_args()
    text = "20-226" if arguments.real_text else "226"
    table = Table(title=f"Packing, {arguments.steps} steps (the first {WARM_UP} not counted), {text} text tokens")
    for name in ("stage", "packs", "seed", "method", "fill", "least", "max/mean cost", "worst step", "CPU us/sample"):
        table.add_column(name, justify="left" if name in ("stage", "method") else "right")
    drawn: list[Row] = []
    for stage in arguments.stages:
        for packs in arguments.packs:
            for seed in arguments.seeds:
                rows = compare(stage, packs, seed, arguments)
                drawn += rows if seed == arguments.seeds[0] else []
                for row in rows:
                    table.add_row(
                        stage, str(packs), str(seed), row.method, f"{row.fill:.2%}", f"{row.least_fill:.2%}",
                        f"{row.ratio:.4f}", f"{row.worst_ratio:.4f}", f"{row.microseconds:.1f}",
                    )  # fmt: skip
    Console(width=max(110, Console().width)).print(table)
    if arguments.svg:
        draw(drawn, arguments.svg)


if __name__ == "__main__":
    main()
