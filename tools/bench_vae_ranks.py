"""The part of `bench_vae.py` that spreads one clip's frames over ranks: peak memory of each, gloo, whole clip.

Each rank measures what it holds beside weights and input while it encodes or decodes its own frames. Without a graph
layers run piece by piece, and a piece's own memory, some 50 MiB on a CPU, is the same on any number of ranks: most of
what a small clip holds. At 480 x 720 one frame is larger than a piece; here, too, a piece is one frame (of the largest
features), so that a small clip's memory has the parts that a large one's has.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_vae_sides import Case, our_model
from rich.console import Console
from rich.table import Table

from megacogvx.models.vae import CogVideoXVAE, VAEConfig, pieces
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.frame_parallel import shard_latents, shard_pixels
from megacogvx.parallel.groups import initialize, shutdown
from megacogvx.testing.peak_memory import peak_bytes

MARK = "peak of rank: "
# Of the widest features, beside a rank's own frames: the halo, and the copy of its own last frames that is on its way.
HALO_FRAMES = 4


def main(arguments: argparse.Namespace) -> None:
    """Print a table of the largest rank's peak, for every size, part and number of ranks, beside what is expected."""
    for size in arguments.sizes:
        found = {ranks: measure(arguments.cases, size, arguments.preset, ranks) for ranks in arguments.ranks}
        for part in arguments.cases:
            table = Table(title=f"{Case(part, 'whole', size)}, frames over ranks", title_justify="left")
            for name in ("ranks", "largest share", "peak MiB of the largest rank", "x", "share + halo MiB", "x"):
                table.add_column(name, justify="right")
            alone = max(each["peak"] for each in found[1] if each["part"] == part) if 1 in found else None
            for ranks, measured in found.items():
                mine = [each for each in measured if each["part"] == part]
                table.add_row(str(ranks), *_figures(mine, alone, ranks))
            Console(width=150).print(table)


def _figures(mine: list[dict[str, Any]], alone: float | None, ranks: int) -> list[str]:
    """Return a row: measured, and expected of one rank's peak, its share and its halo."""
    peak, share = max(each["peak"] for each in mine), max(each["share"] for each in mine)
    figures = [f"{share:.3f}", f"{peak / 2**20:.0f}"]
    if alone is None:
        return [*figures, "", "", ""]
    expected = share * alone + (HALO_FRAMES * mine[0]["frame"] if ranks > 1 else 0)
    return [*figures, f"{peak / alone:.3f}", f"{expected / 2**20:.0f}", f"{expected / alone:.3f}"]


def measure(parts: list[str], size: tuple[int, int, int], preset: str, ranks: int) -> list[dict[str, Any]]:
    """Return what each of `ranks` new processes measured, a dictionary for each of `parts`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(Path(__file__)), "x".join(map(str, size)), preset, *parts]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
    lines = [line.partition(MARK)[2] for line in done.stdout.splitlines() if MARK in line]
    assert len(lines) == ranks * len(parts), done.stdout
    return [json.loads(line) for line in lines]


def worker(size: tuple[int, int, int], preset: str, parts: list[str]) -> None:
    """Measure this rank and print it."""
    ranks = int(os.environ["WORLD_SIZE"])
    groups = initialize(ParallelConfig(device="cpu", context_parallel_size=ranks))
    model = our_model(VAEConfig(preset=preset), torch.float32, "cpu")
    pieces.PIECE_BYTES["cpu"] = model.config.block_out_channels[0] * size[1] * size[2] * torch.float32.itemsize
    for part in parts:
        measured = {"part": part, **measure_part(model, part, size, groups.context_group)}
        sys.stdout.write(MARK + json.dumps(measured) + "\n")
        sys.stdout.flush()
    shutdown()


def measure_part(
    model: CogVideoXVAE, part: str, size: tuple[int, int, int], group: dist.ProcessGroup
) -> dict[str, float]:
    """Return this rank's peak in bytes, its share of the frames, and the bytes of a frame of the widest features."""
    whole = Case(part, "whole", size).input(model.config)
    if part == "encode":
        shard = shard_pixels(size[0], model.config.temporal_compression_ratio, group)
        out = shard
    else:
        shard = shard_latents(whole.shape[2], group)
        out = shard
        for _ in range(model.config.temporal_levels):
            out = out.doubled()
    mine = shard.cut(whole).clone()
    del whole
    code = model.encode if part == "encode" else model.decode
    with torch.no_grad():
        peak = peak_bytes(lambda: code(mine, shard=shard))
    widths = model.config.block_out_channels
    # At full height and width the decoder's last stage starts as wide as the one before it.
    frame = (widths[0] if part == "encode" else widths[1]) * size[1] * size[2] * mine.element_size()
    return {"peak": peak, "share": out.share, "frame": frame}


if __name__ == "__main__":
    frames, height, width = (int(number) for number in sys.argv[1].split("x"))
    worker((frames, height, width), sys.argv[2], sys.argv[3:])
