"""Measure the memory of conversions on a 5B-shaped checkpoint: full width, few layers, random weights.

    python tools/measure_conversion.py --layers 3 --folder /some/disk

Each conversion runs in a process of its own; its peak resident memory, less what the process holds before it begins, is
set against the bound of 1.3 x the largest file of source or output plus the largest tensor.
"""

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch

from megacogvx.conversion.convert import convert, open_parts
from megacogvx.conversion.part import DTYPES, ReadOptions
from megacogvx.conversion.settings import TransformerSettings, published_settings
from megacogvx.models.transformer.config import CogVideoXConfig
from megacogvx.testing.drawn_checkpoint import drawn_part

WAY = ("diffusers", "megacogvx", "sat", "diffusers")  # from the first to the second, and so on
HEADROOM = 1.3


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the memory of conversions on a 5B-shaped checkpoint.")
    parser.add_argument("--layers", type=int, default=3, help="blocks of full width (default: 3)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--max-shard-bytes", type=int, default=5 * 10**9, help="of diffusers' files")
    parser.add_argument("--folder", type=Path, required=True, help="for the checkpoints; removed at the end")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # SOURCE FORMAT OUTPUT, in a process of its own
    arguments = parser.parse_args()
    if arguments.one:
        source, to, output = arguments.one
        print(json.dumps(measure(Path(source), to, Path(output), arguments.max_shard_bytes)))
        return
    sys.exit(0 if report(arguments) else 1)


def measure(source: Path, to: str, output: Path, max_shard_bytes: int) -> dict[str, float]:
    """Convert, and return peak memory above the start, the bound (both bytes), and seconds."""
    parts = open_parts([source], ReadOptions())
    before, began = psutil.Process().memory_info().rss, time.perf_counter()
    reset_peak()
    convert(parts, to, output, max_shard_bytes=max_shard_bytes)
    infos = parts["transformer"].tensors.infos.values()
    files = [file.stat().st_size for folder in (source, output) for file in folder.rglob("*") if file.is_file()]
    return {
        "peak": peak() - before,
        "bound": HEADROOM * max(files) + max(info.nbytes for info in infos),
        "largest_file": max(files),
        "largest_tensor": max(info.nbytes for info in infos),
        "seconds": time.perf_counter() - began,
    }


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Return this process's highest resident memory since `reset_peak`, in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def report(arguments: argparse.Namespace) -> bool:
    """Print a line for each conversion; return whether all kept the bound and the last equals the first."""
    folder = arguments.folder
    try:
        model = CogVideoXConfig(preset="cogvideox_5b", num_layers=arguments.layers)
        settings = TransformerSettings(**{**vars(published_settings("5b")), "model": model})
        source, kept = folder / "0", True
        part = drawn_part(settings, DTYPES[arguments.dtype])
        convert({"transformer": part}, WAY[0], source, max_shard_bytes=arguments.max_shard_bytes, check=False)
        total = sum(info.nbytes for info in part.tensors.infos.values())
        print(f"5B-shaped, {arguments.layers} layers, {arguments.dtype}: {total / 1e9:.2f} GB")
        for place, (before, to) in enumerate(itertools.pairwise(WAY), start=1):
            output = folder / str(place)
            command = [sys.executable, __file__, "--folder", str(folder), "--one", str(source), to, str(output),
                       "--max-shard-bytes", str(arguments.max_shard_bytes)]  # fmt: skip
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            mb = {name: value / 1e6 for name, value in found.items()}
            print(
                f"{before:>9} -> {to:<9} peak {mb['peak']:7.0f} MB, bound {mb['bound']:7.0f} MB (largest file "
                f"{mb['largest_file']:.0f}, tensor {mb['largest_tensor']:.0f}), {found['seconds']:.0f} s"
            )
            source, kept = output, kept and found["peak"] <= found["bound"]
        same = all(
            torch.equal(a.read(name), part.tensors.read(name))
            for a in [open_parts([source], ReadOptions())["transformer"].tensors]
            for name in part.tensors.infos
        )
        print(f"the last equals the first bit for bit: {same}")
        return same and kept
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
