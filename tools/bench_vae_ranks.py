"""The part of `bench_vae.py` that spreads one clip's frames over ranks: peak memory of each, gloo, whole clip.

Each rank measures what it holds beside weights and input while it encodes or decodes its own frames.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from bench_vae_sides import Case, our_model
from rich.console import Console
from rich.table import Table

from megacogvx.models.vae import VAEConfig
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.frame_parallel import shard_latents, shard_pixels
from megacogvx.parallel.groups import initialize, shutdown
from megacogvx.testing.peak_memory import peak_bytes

MARK = "peak of rank: "


def main(arguments: argparse.Namespace) -> None:
    """Print a table of the largest rank's peak, for every size, part and number of ranks."""
    for size in arguments.sizes:
        for part in arguments.cases:
            table = Table(title=f"{Case(part, 'whole', size)}, frames over ranks", title_justify="left")
            for name in ("ranks", "largest share of the frames", "peak MiB of the largest rank", "x of one rank's"):
                table.add_column(name, justify="right")
            alone = 0
            for ranks in arguments.ranks:
                found = measure(part, size, arguments.preset, ranks)
                peak, share = max(each["peak"] for each in found), max(each["share"] for each in found)
                alone = peak if ranks == 1 else alone
                relative = f"{peak / alone:.2f}" if alone else ""
                table.add_row(str(ranks), f"{share:.2f}", f"{peak / 2**20:.0f}", relative)
            Console(width=150).print(table)


def measure(part: str, size: tuple[int, int, int], preset: str, ranks: int) -> list[dict[str, float]]:
    """Return what each of `ranks` new processes measured."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(Path(__file__)), part, "x".join(map(str, size)), preset]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
    lines = [line.partition(MARK)[2] for line in done.stdout.splitlines() if MARK in line]
    assert len(lines) == ranks, done.stdout
    return [json.loads(line) for line in lines]


def worker(part: str, size: tuple[int, int, int], preset: str) -> None:
    """Measure this rank and print it."""
    ranks = int(os.environ["WORLD_SIZE"])
    groups = initialize(ParallelConfig(device="cpu", context_parallel_size=ranks))
    model = our_model(VAEConfig(preset=preset), torch.float32, "cpu")
    whole = Case(part, "whole", size).input(model.config)
    if part == "encode":
        shard = shard_pixels(size[0], model.config.temporal_compression_ratio, groups.context_group)
    else:
        shard = shard_latents(whole.shape[2], groups.context_group)
    mine = shard.cut(whole).clone()
    code = model.encode if part == "encode" else model.decode
    with torch.no_grad():
        peak = peak_bytes(lambda: code(mine, shard=shard))
    sys.stdout.write(MARK + json.dumps({"peak": peak, "share": shard.share}) + "\n")
    sys.stdout.flush()
    shutdown()


if __name__ == "__main__":
    frames, height, width = (int(number) for number in sys.argv[2].split("x"))
    worker(sys.argv[1], (frames, height, width), sys.argv[3])
