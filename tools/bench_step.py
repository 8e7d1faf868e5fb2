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
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from bench_step_sides import Case, OneByOne, OurPack, TheirBatch, diffusers_model, our_model
from bench_step_turns import Ratio, Side, console, peak_bytes, print_table, take_turns

from megacogvx.models.transformer import CogVideoXConfig
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.groups import ParallelGroups, initialize
from megacogvx.testing import length_distribution as lengths

EXPECTED = """Expected (matrix products and attention are 94% of a step on a CPU, and both sides do the same ones):
  dense, equal shapes   time <= 1.05x of diffusers', peak memory <= 0.8x at equal recompute policy
  mixed pack            >= 1.3x as fast as diffusers padded to the longest, no slower than sample by sample
  outputs, gradients    fp32: 1e-5, 1e-4 relative; bf16: 2e-2, 1e-1"""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DENSE = ((7, 24, 24, 226),) * 2  # (T, H, W) of the latents, text tokens: 2 x 1,234 tokens
LAYERS = {"dense": 4, "mixed": 2}
SHRINK = 4  # of the mixed samples in height and width, and of their text by its square: the same share of the tokens
POLICIES = ("none", "selective", "full")
Ratios = dict[str, Ratio]  # what was measured, by case and side


def dense(
    config: CogVideoXConfig,
    dtype: torch.dtype,
    rounds: int,
    groups: ParallelGroups,
    policies: Sequence[str] = POLICIES,
) -> Ratios:
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
    found: Ratios = {}
    for group in ([reference, *kept] if kept else [], [again, ours["full"]] if "full" in ours else []):
        if not group:
            continue
        take_turns(group, case, rounds)
        for side in group:
            side.peak = peak_bytes(side)
        title = f"dense, {len(DENSE)} x {case.layout.samples[0].length:,} tokens, {dtype}"
        found |= print_table(title, group, group[0], case)
    return found


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
) -> Ratios:
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
    found = print_table(f"mixed, seed {seed}, {tokens}, {dtype}", sides, sides[1], case)
    pack, one_by_one, long = (statistics.median(side.wall) for side in (sides[3], sides[1], sides[0]))
    console.print(f"one pack: {long / pack:.2f}x as fast as padded, {one_by_one / pack:.2f}x as fast as one by one\n")
    return found


def measure(arguments: argparse.Namespace) -> Ratios:
    """Measure and print every case that was asked for."""
    groups = initialize(ParallelConfig(device="cpu"))
    config = {
        case: CogVideoXConfig(
            num_layers=arguments.layers or layers, num_attention_heads=arguments.heads,
            use_rotary_positional_embeddings=True,
        )
        for case, layers in LAYERS.items()
    }  # fmt: skip
    found: Ratios = {}
    for name in arguments.dtypes:
        if "dense" in arguments.cases:
            sides = dense(config["dense"], DTYPES[name], arguments.rounds, groups, arguments.policies)
            found |= {f"dense, {name}: {side}": ratio for side, ratio in sides.items()}
        for seed in arguments.seeds if "mixed" in arguments.cases else ():
            sides = mixed(config["mixed"], DTYPES[name], arguments.rounds, groups, seed, arguments.shrink)
            found |= {f"mixed {seed}, {name}: {side}": ratio for side, ratio in sides.items()}
    return found


def over_processes(arguments: argparse.Namespace) -> None:
    """Measure in several processes, one after the other, and print what the ratios of all of them are.

    Where buffers happen to lie in memory stays the same for all rounds of a process and may favour a side; another
    process draws anew.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        runs = list(pool.map(measure, [arguments] * arguments.processes))
    console.print(f"in {len(runs)} processes, median (least to most):", *spread(runs), sep="\n", highlight=False)


def spread(runs: list[Ratios]) -> list[str]:
    """Return a line for each side: the median of all processes' ratios, the least and the most."""
    lines = []
    for side in runs[0]:
        figures = []
        for name in ("wall", "cpu", "peak"):
            values = sorted(getattr(run[side], name) for run in runs)
            figures.append(f"{name} {statistics.median(values):.3f} ({values[0]:.3f} to {values[-1]:.3f})")
        lines.append(f"  {side:<56} {', '.join(figures)}")
    return lines


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
    parser.add_argument("--processes", type=int, default=1, help="to measure in; ratios differ by process")
    parser.add_argument("--gpu", action="store_true", help="one 5B layer on a GPU, in bf16, and nothing else")
    parser.add_argument("--packs", nargs="+", type=int, choices=range(4), default=range(4), help="of --gpu: 5 x 5,218, "
                        "4 x 17,776, 1 x 85,906 and 8 x 85,906 tokens; a part where time is short")  # fmt: skip
    arguments = parser.parse_args()
    if arguments.gpu:
        import bench_step_gpu

        return bench_step_gpu.main(arguments.packs)
    console.print(EXPECTED, highlight=False)
    console.print(f"threads: {torch.get_num_threads()}; torch {torch.__version__}\n", highlight=False)
    if arguments.processes > 1:
        return over_processes(arguments)
    measure(arguments)


if __name__ == "__main__":
    main()
