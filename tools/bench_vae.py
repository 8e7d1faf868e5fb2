#!/usr/bin/env python
"""The VAE beside diffusers' AutoencoderKLCogVideoX: time, memory, outputs; and over ranks.

The same weights, inputs, threads and process; the sides take turns. Peak memory is that of all tensors, the result
among them, weights and input left out (`testing.peak_memory`); oneDNN's copies in other layouts are in neither figure.
Like for like: whole clips against whole clips, chunks against chunks.

On a CPU, one thread, half an hour (a part: --cases encode --modes chunked --sizes 17x128x128 --rounds 1):

    OMP_NUM_THREADS=1 python tools/bench_vae.py
    OMP_NUM_THREADS=1 python tools/bench_vae.py --ranks 1 2 4      peak memory of each rank, frames over ranks

On a GPU: python tools/bench_vae.py --gpu       frames/s, peak memory and the largest clip that fits, in bf16
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import torch
from bench_vae_sides import CODINGS, PARTS, Case, Ours, Theirs, diffusers_model, our_model
from rich.console import Console
from rich.table import Table

from megacogvx.log import progress
from megacogvx.models.vae import VAEConfig
from megacogvx.testing.peak_memory import peak_bytes
from megacogvx.testing.tolerance import relative_error

EXPECTED = """Expected: time <= 1.0x of diffusers', peak memory <= 0.8x, outputs within 1e-5 (fp32);
over ranks: 1 / ranks of one rank's, plus two frames of halo in front of each convolution"""
SIZES = ("17x128x128", "49x128x128")
OUTPUT_BOUND = 1e-5
console = Console(width=150)


def compare(case: Case, ours: Ours, theirs: Theirs, rounds: int) -> None:
    """Run both sides in turn, after one warm-up each, and print what was measured; ratios are of medians."""
    results, seconds, peaks = {}, {}, {}
    for side in (theirs, ours):  # the memory's run is the warm-up
        peaks[side.name] = peak_bytes(side)
    for _ in progress(range(rounds), str(case)):
        for side in (theirs, ours):
            wall, cpu = time.perf_counter(), os.times().user
            results[side.name] = side()
            spent = (time.perf_counter() - wall, os.times().user - cpu)
            seconds.setdefault(side.name, []).append(spent)
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
    parser.add_argument("--sizes", nargs="+", type=size_of, default=[size_of(text) for text in SIZES], help="TxHxW")
    parser.add_argument("--preset", default="cogvideox", help="of the VAE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", nargs="+", type=int, help="memory over so many ranks, and nothing else")
    parser.add_argument("--gpu", action="store_true", help="the GPU's part, and nothing else")
    arguments = parser.parse_args()
    if arguments.gpu:
        import bench_vae_gpu

        return bench_vae_gpu.main()
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
