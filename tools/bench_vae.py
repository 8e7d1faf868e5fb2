#!/usr/bin/env python
"""The VAE beside diffusers' AutoencoderKLCogVideoX: time, memory, outputs; and over ranks.

The same weights, inputs, threads and process; the sides take turns. Peak memory is that of all tensors, the result
among them, weights and input left out (`testing.peak_memory`); oneDNN's copies in other layouts are in neither figure.
Both are measured in the same run: the profiler costs microseconds a layer, which take tenths of a second here.
Like for like: whole clips against whole clips, chunks against chunks.

On a CPU, one thread, an hour and a half (a part: --cases encode --modes chunked --sizes 17x128x128 --rounds 1):

    OMP_NUM_THREADS=1 python tools/bench_vae.py
    OMP_NUM_THREADS=1 python tools/bench_vae.py --ranks 1 2 4      peak memory of each rank, frames over ranks

On a GPU: python tools/bench_vae.py --gpu       frames/s and peak memory in bf16; with --longest, the longest clips
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from functools import partial

import torch
from bench_vae_sides import CODINGS, PARTS, Case, Ours, Theirs, diffusers_model, our_model
from rich.console import Console
from rich.table import Table

from megacogvx.log import progress
from megacogvx.models.vae import VAEConfig
from megacogvx.testing.peak_memory import peak_bytes
from megacogvx.testing.tolerance import relative_error

EXPECTED = """Expected: time <= 1.0x of diffusers', peak memory <= 0.8x, outputs within 1e-5 (fp32);
over ranks: the share of the frames of one rank's, plus four frames: the halo, and a copy of those on their way"""
SIZES = ("17x128x128", "49x128x128")
OUTPUT_BOUND = 1e-5
console = Console(width=150)


def compare(case: Case, ours: Ours, theirs: Theirs, rounds: int) -> None:
    """Let the sides take turns, after a small clip each, and print what was measured; ratios are of medians."""
    results: dict[str, torch.Tensor] = {}
    seconds: dict[str, list[tuple[float, float]]] = {theirs.name: [], ours.name: []}
    peaks = dict.fromkeys(seconds, 0)

    def run(side: Ours | Theirs) -> None:
        wall, cpu = time.perf_counter(), os.times().user
        results[side.name] = side()
        seconds[side.name].append((time.perf_counter() - wall, os.times().user - cpu))

    for side in (theirs, ours):
        side.smaller()()
    for _ in progress(range(rounds), str(case)):
        for side in (theirs, ours):
            results.pop(side.name, None)
            peaks[side.name] = max(peaks[side.name], peak_bytes(partial(run, side)))
    error = relative_error(results[ours.name], results[theirs.name])
    table = Table(title=str(case), title_justify="left", title_style="bold")
    for name in ("side", "wall s", "x", "CPU s", "x", "peak MiB", "x", "relative error"):
        table.add_column(name, justify="left" if name == "side" else "right")
    base = [statistics.median(column) for column in zip(*seconds[theirs.name], strict=True)]
    for side in (theirs, ours):
        wall, cpu = (statistics.median(column) for column in zip(*seconds[side.name], strict=True))
        peak = peaks[side.name]
        broken = " BROKEN" if error > OUTPUT_BOUND else ""
        table.add_row(
            side.name, f"{wall:.2f}", f"{wall / base[0]:.3f}", f"{cpu:.2f}", f"{cpu / base[1]:.3f}",
            f"{peak / 2**20:.0f}", f"{peak / peaks[theirs.name]:.2f}",
            f"{error:.1e}{broken}" if side is ours else "",
        )  # fmt: skip
    console.print(table)


def size_of(text: str) -> tuple[int, int, int]:
    """Return (T, H, W) of "17x128x128"."""
    frames, height, width = (int(part) for part in text.split("x"))
    return frames, height, width


def main() -> None:
    """Print the expectation, then the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--modes", nargs="+", choices=list(CODINGS), default=["whole", "chunked"])
    parser.add_argument("--sizes", nargs="+", type=size_of, help=f"TxHxW (default: {' '.join(SIZES)})")
    parser.add_argument("--preset", default="cogvideox", help="of the VAE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", nargs="+", type=int, help="memory over so many ranks, and nothing else")
    parser.add_argument("--gpu", action="store_true", help="the GPU's part, and nothing else")
    parser.add_argument("--longest", action="store_true", help="with --gpu: the longest clips that fit, and no times")
    arguments = parser.parse_args()
    if arguments.gpu:
        import bench_vae_gpu

        return bench_vae_gpu.main(arguments)
    arguments.sizes = arguments.sizes or [size_of(text) for text in SIZES]
    console.print(EXPECTED, highlight=False)
    console.print(f"threads: {torch.get_num_threads()}; torch {torch.__version__}\n", highlight=False)
    if arguments.ranks:
        import bench_vae_ranks

        return bench_vae_ranks.main(arguments)
    model = our_model(VAEConfig(preset=arguments.preset), torch.float32, "cpu")
    theirs = diffusers_model(model)
    for size in arguments.sizes:
        for part in arguments.cases:
            for mode in arguments.modes:
                case = Case(part, mode, size)
                ours = Ours(model, case)
                compare(case, ours, Theirs(theirs, case, ours.x), arguments.rounds)


if __name__ == "__main__":
    main()
