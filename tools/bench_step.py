#!/usr/bin/env python
"""Forward and backward of the transformer beside diffusers' CogVideoXTransformer3DModel: time, memory, outputs.

The same weights, inputs, threads and process; the sides take turns, and every round's outputs are compared. Peak memory
is that of all tensors of one forward and backward, weights and inputs left out, from the memory events of torch's
profiler: exact, and free of what an allocator keeps for later.

On a CPU, one thread (ten minutes; a part: --cases dense --dtypes fp32 --rounds 3):

    OMP_NUM_THREADS=1 python tools/bench_step.py

On a GPU, one layer of the 5B model (`bench_step_gpu.py`): python tools/bench_step.py --gpu
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from bench_step_sides import Case, OneByOne, OurPack, Rows, TheirBatch, diffusers_model, gradients, our_model
from rich.console import Console
from rich.table import Table

from megacogvx import draws
from megacogvx.log import progress
from megacogvx.models.transformer import CogVideoXConfig
from megacogvx.models.transformer.flops import training_flops
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.groups import ParallelGroups, initialize
from megacogvx.testing import length_distribution as lengths
from megacogvx.testing.peak_memory import peak_bytes as peak_bytes_of
from megacogvx.testing.tolerance import relative_error

EXPECTED = """Expected (matrix products and attention are 94% of a step on a CPU, and both sides do the same ones):
  dense, equal shapes   time <= 1.05x of diffusers', peak memory <= 0.8x at equal recompute policy
  mixed pack            >= 1.3x as fast as diffusers padded to the longest, no slower than sample by sample
  outputs, gradients    fp32: 1e-5, 1e-4 relative; bf16: 2e-2, 1e-1"""
BOUNDS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 1e-1)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DENSE = ((7, 24, 24, 226),) * 2  # (T, H, W) of the latents, text tokens: 2 x 1,234 tokens
LAYERS = {"dense": 4, "mixed": 2}
SHRINK = 4  # of the mixed samples in height and width, and of their text by its square: the same share of the tokens
POLICIES = ("none", "selective", "full")
console = Console(width=150)


@dataclass
class Side:
    """One contestant and what was measured of it.

    Attributes:
        name: as printed.
        run: forward and backward, gives the rows of each sample.
        model: whose gradients are cleared before, and compared after.
        compared: whether its outputs and gradients are those of the case (padding changes what is computed).
        wall, cpu: seconds of each round; cpu is the user time of all threads.
        peak: bytes.
    """

    name: str
    run: Callable[[], Rows]
    model: Any
    compared: bool = True
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak: int = 0
    rows: Rows = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)


def take_turns(sides: list[Side], case: Case, rounds: int) -> None:
    """Run every side once to warm up, then `rounds` times in turn; the last round's results are kept."""
    for number in progress(range(rounds + 1), "rounds"):
        for side in sides:
            side.model.zero_grad(set_to_none=True)
            wall, cpu = time.perf_counter(), os.times().user
            rows = side.run()
            if number:
                side.wall.append(time.perf_counter() - wall)
                side.cpu.append(os.times().user - cpu)
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


def print_table(title: str, sides: list[Side], reference: Side, case: Case) -> None:
    """Print what was measured; ratios are of medians, over `reference`, and errors beside `exact`'s results."""
    truth = exact(case, reference)
    flops = training_flops(case.config, case.layout)
    rate = f"a matrix product of this minute: {matmul_rate(case.dtype):.0f} GFLOP/s"
    table = Table(title=f"{title}; {rate}", title_justify="left", title_style="bold")
    for name in ("side", "wall s", "x", "CPU s", "x", "GFLOP/s", "peak MiB", "x", "rel. error of outputs, gradients"):
        table.add_column(name, justify="left" if name in ("side", "rel. error of outputs, gradients") else "right")
    base_wall, base_cpu = statistics.median(reference.wall), statistics.median(reference.cpu)
    for side in sides:
        wall, cpu = statistics.median(side.wall), statistics.median(side.cpu)
        table.add_row(
            side.name, f"{wall:.2f}", f"{wall / base_wall:.3f}", f"{cpu:.2f}", f"{cpu / base_cpu:.3f}",
            f"{flops / wall / 1e9:.0f}", f"{side.peak / 2**20:.0f}" if side.peak else "",
            f"{side.peak / reference.peak:.2f}" if side.peak else "", compare(side, truth, case.dtype),
        )  # fmt: skip
    console.print(table)


def dense(
    config: CogVideoXConfig,
    dtype: torch.dtype,
    rounds: int,
    groups: ParallelGroups,
    policies: Sequence[str] = POLICIES,
) -> None:
    """Equal samples: our pack against their batch; "full" is held to their gradient checkpointing."""
    case = Case(config, DENSE, dtype)
    theirs, checkpointed = diffusers_model(case), diffusers_model(case)
    checkpointed.enable_gradient_checkpointing()
    places = range(len(case.sizes))
    reference = Side("diffusers", TheirBatch(case, theirs, places), theirs)
    again = Side("diffusers, gradient checkpointing", TheirBatch(case, checkpointed, places), checkpointed)
    ours = {}
    for policy in policies:
        model = our_model(case, theirs, groups, policy)
        ours[policy] = Side(f"megacogvx, recompute {policy}", OurPack(case, model, places), model)
    kept = [ours[policy] for policy in policies if policy != "full"]
    for group in ([reference, *kept] if kept else [], [again, ours["full"]] if "full" in ours else []):
        if not group:
            continue
        take_turns(group, case, rounds)
        for side in group:
            side.peak = peak_bytes(side)
        print_table(f"dense, {len(DENSE)} x {case.layout.samples[0].length:,} tokens, {dtype}", group, group[0], case)


def mixed_sizes(seed: int, shrink: int = SHRINK) -> tuple[tuple[int, int, int, int], ...]:
    """Return (T, H, W, text) of the first 12 stage-1 samples, scaled down in space by `shrink`."""
    _, per_frame, frames = lengths.sample_lengths("stage1", 12, seed)
    short = 256 // 16 // shrink  # tokens; the short side of every stage-1 sample is 256 pixels
    text = lengths.TEXT // shrink**2
    return tuple(
        (int(t), 2 * short, 2 * round(int(cells) / 16 / shrink), text)
        for t, cells in zip(frames, per_frame, strict=True)
    )


def mixed(
    config: CogVideoXConfig,
    dtype: torch.dtype,
    rounds: int,
    groups: ParallelGroups,
    seed: int,
    shrink: int = SHRINK,
) -> None:
    """Samples of the length distribution: one pack, against one by one on either side, and padded to the longest."""
    case = Case(config, mixed_sizes(seed, shrink), dtype)
    theirs = diffusers_model(case)
    model = our_model(case, theirs, groups)
    places = range(len(case.sizes))
    longest = max(places, key=lambda place: case.layout.samples[place].length)
    each = OneByOne([TheirBatch(case, theirs, (place,)) for place in places])
    alone = OneByOne([OurPack(case, model, (place,)) for place in places])
    padded = Side("diffusers, padded to the longest", TheirBatch(case, theirs, places, longest), theirs, compared=False)
    sides = [
        padded,
        Side("diffusers, sample by sample", each, theirs),
        Side("megacogvx, sample by sample", alone, model),
        Side("megacogvx, one pack", OurPack(case, model, places), model),
    ]
    take_turns(sides, case, rounds)
    tokens = f"{case.layout.used_tokens:,} tokens, {12 * case.layout.samples[longest].length:,} when padded"
    print_table(f"mixed, seed {seed}, {tokens}, {dtype}", sides, sides[1], case)
    pack, one_by_one, long = (statistics.median(side.wall) for side in (sides[3], sides[1], sides[0]))
    console.print(f"one pack: {long / pack:.2f}x as fast as padded, {one_by_one / pack:.2f}x as fast as one by one\n")


def main() -> None:
    """Print the expectation, then the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=["dense", "mixed"], default=["dense", "mixed"])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the mixed packs")
    parser.add_argument("--layers", type=int, default=None, help=f"default: {LAYERS}")
    parser.add_argument("--heads", type=int, default=8, help="of width 64")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES), help="of the dense case")
    parser.add_argument("--shrink", type=int, choices=(2, 4, 8), default=SHRINK, help="of the mixed packs, in space")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gpu", action="store_true", help="one 5B layer on a GPU, in bf16, and nothing else")
    parser.add_argument("--packs", nargs="+", type=int, choices=range(4), default=range(4), help="of --gpu: 5 x 5,218, "
                        "4 x 17,776, 1 x 85,906 and 8 x 85,906 tokens; a part where time is short")  # fmt: skip
    arguments = parser.parse_args()
    if arguments.gpu:
        import bench_step_gpu

        return bench_step_gpu.main(arguments.packs)
    console.print(EXPECTED, highlight=False)
    console.print(f"threads: {torch.get_num_threads()}; torch {torch.__version__}\n", highlight=False)
    groups = initialize(ParallelConfig(device="cpu"))
    config = {
        case: CogVideoXConfig(
            num_layers=arguments.layers or layers, num_attention_heads=arguments.heads,
            use_rotary_positional_embeddings=True,
        )
        for case, layers in LAYERS.items()
    }  # fmt: skip
    for dtype in (DTYPES[name] for name in arguments.dtypes):
        if "dense" in arguments.cases:
            dense(config["dense"], dtype, arguments.rounds, groups, arguments.policies)
        for seed in arguments.seeds if "mixed" in arguments.cases else ():
            mixed(config["mixed"], dtype, arguments.rounds, groups, seed, arguments.shrink)


if __name__ == "__main__":
    main()
