"""Contestants that take turns: time, memory and errors of each, as `bench_step.py` prints them."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from bench_step_sides import Case, OneByOne, Rows, TheirBatch, diffusers_model, gradients
from rich.console import Console
from rich.table import Table

from megacogvx import draws
from megacogvx.log import progress
from megacogvx.models.transformer.flops import training_flops
from megacogvx.testing.peak_memory import peak_bytes as peak_bytes_of
from megacogvx.testing.tolerance import relative_error

BOUNDS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 1e-1)}
COLUMNS = (
    "side", "wall s", "x", "CPU s", "x", "GFLOP/s", "page faults", "peak MiB", "x", "rel. error of outputs, gradients"
)  # fmt: skip
console = Console(width=160)


@dataclass
class Side:
    """One contestant and what was measured of it.

    Attributes:
        name: as printed.
        run: forward and backward, gives the rows of each sample.
        model: whose gradients are cleared before, and compared after.
        compared: whether its outputs and gradients are those of the case (padding changes what is computed).
        wall, cpu: seconds of each round; cpu is the user time of all threads.
        faults: pages that each round had to ask the system for, some microseconds each: what the C allocator keeps of
            freed memory, by sizes and by what the process did before, is spared them.
        peak: bytes.
    """

    name: str
    run: Callable[[], Rows]
    model: Any
    compared: bool = True
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    faults: list[int] = field(default_factory=list)
    peak: int = 0
    rows: Rows = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)


def take_turns(sides: list[Side], case: Case, rounds: int) -> None:
    """Run every side once to warm up, then `rounds` times in turn; the last round's results are kept."""
    for number in progress(range(rounds + 1), "rounds"):
        for side in sides if number % 2 else sides[::-1]:
            side.model.zero_grad(set_to_none=True)
            wall, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
            rows = side.run()
            if number:
                used = resource.getrusage(resource.RUSAGE_SELF)
                side.wall.append(time.perf_counter() - wall)
                side.cpu.append(used.ru_utime - before.ru_utime)
                side.faults.append(used.ru_minflt - before.ru_minflt)
            if number == rounds and side.compared:
                side.rows = rows
                side.gradients = dict(gradients(side.model, case.config))


def peak_bytes(side: Side) -> int:
    """Return the most bytes that the tensors of one forward and backward hold at a time, the gradients among them."""
    side.model.zero_grad(set_to_none=True)
    return peak_bytes_of(side.run)


def exact(case: Case, theirs: Side) -> Side:
    """Return what all sides are compared with: in fp32 diffusers' own results.

    In narrower types diffusers in fp32 with the same rounded weights and inputs, sample by sample: in bf16 its own
    gradients of the QK-norms, summed over all tokens and heads, are up to 0.24 away from that.
    """
    if case.dtype == torch.float32:
        return theirs
    wide = replace(case, precision=torch.float32)
    model = diffusers_model(wide)
    run = OneByOne([TheirBatch(wide, model, (place,)) for place in range(len(case.sizes))])
    return Side("diffusers in fp32", run, model, rows=run(), gradients=dict(gradients(model, case.config)))


def compare(side: Side, reference: Side, dtype: torch.dtype) -> str:
    """Return the largest relative errors of outputs and gradients beside `exact`'s; a broken bound is marked."""
    if not side.compared or side is reference:
        return ""
    norm = max(float(gradient.float().norm()) for gradient in reference.gradients.values())
    outputs = max(relative_error(a, b) for a, b in zip(side.rows, reference.rows, strict=True))
    worst = max(
        relative_error(side.gradients[name], gradient)
        for name, gradient in reference.gradients.items()
        if float(gradient.float().norm()) > 1e-4 * norm  # less is rounding of larger terms that cancel
    )
    broken = outputs > BOUNDS[dtype][0] or worst > BOUNDS[dtype][1]
    return f"{outputs:.1e}, {worst:.1e}{' BROKEN' if broken else ''}"


def matmul_rate(dtype: torch.dtype) -> float:
    """Return the GFLOP/s of a matrix product of this minute: 1024 x 1024 x 1024, the best of eight."""
    a, b = (draws.normal((1024, 1024), 0, name).to(dtype) for name in "ab")
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best / 1e9


@dataclass(frozen=True)
class Ratio:
    """A side over the one that it is compared with: medians of the rounds' wall and CPU time, and the peak."""

    wall: float
    cpu: float
    peak: float


def ratio(side: Side, reference: Side) -> Ratio:
    """Return `side` over `reference`; a peak that wasn't measured is 0."""
    wall = statistics.median(side.wall) / statistics.median(reference.wall)
    cpu = statistics.median(side.cpu) / statistics.median(reference.cpu)
    return Ratio(wall, cpu, side.peak / reference.peak if reference.peak else 0.0)


def print_table(title: str, sides: list[Side], reference: Side, case: Case) -> dict[str, Ratio]:
    """Print and return what was measured: ratios over `reference`, and errors beside `exact`'s results."""
    truth = exact(case, reference)
    flops = training_flops(case.config, case.layout)
    rate = f"a matrix product of this minute: {matmul_rate(case.dtype):.0f} GFLOP/s"
    table = Table(title=f"{title}; {rate}", title_justify="left", title_style="bold")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in (COLUMNS[0], COLUMNS[-1]) else "right")
    over = {side.name: ratio(side, reference) for side in sides}
    for side in sides:
        wall, cpu = statistics.median(side.wall), statistics.median(side.cpu)
        table.add_row(
            side.name, f"{wall:.2f}", f"{over[side.name].wall:.3f}", f"{cpu:.2f}", f"{over[side.name].cpu:.3f}",
            f"{flops / wall / 1e9:.0f}", f"{statistics.median(side.faults):,.0f}",
            f"{side.peak / 2**20:.0f}" if side.peak else "", f"{over[side.name].peak:.2f}" if side.peak else "",
            compare(side, truth, case.dtype),
        )  # fmt: skip
    console.print(table)
    return over
