"""The GPU's part of `bench_vae.py`: frames/s and peak memory in bf16, and the largest clip that fits.

Ours beside diffusers, the same weights, coding and inputs; a side that runs out of memory is told so. Times are medians
of CUDA events after a warm-up. Written for one H100 or H200; not part of the CPU's tests but for what needs no GPU.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from bench_vae_sides import CODINGS, PARTS, Case, Ours, Theirs, diffusers_model, our_model
from diffusers import AutoencoderKLCogVideoX
from rich.console import Console
from rich.table import Table

from megacogvx.models.vae import CogVideoXVAE, VAEConfig
from megacogvx.testing.tolerance import relative_error

SIZES = ((49, 480, 720), (161, 768, 1360))
ROUNDS = 5
MOST_PERIODS = 512  # 4,097 frames
console = Console(width=150)


def main() -> None:
    """Print a table for each size, then the longest clips."""
    if not torch.cuda.is_available():
        raise SystemExit("--gpu: torch sees no CUDA device")
    ours = our_model(VAEConfig(), torch.bfloat16, "cuda")
    theirs = diffusers_model(ours)
    console.print(f"{torch.cuda.get_device_name()}; torch {torch.__version__}", highlight=False)
    for size in SIZES:
        table = Table(title=f"{' x '.join(map(str, size))}, bf16", title_justify="left", title_style="bold")
        for name in ("part", "coding", "side", "frames/s", "x", "peak GiB", "x", "relative error"):
            table.add_column(name)
        for part in PARTS:
            for mode in CODINGS:
                add_rows(table, Case(part, mode, size, torch.bfloat16, "cuda"), ours, theirs)
        console.print(table)
    for _, height, width in SIZES:
        for part in PARTS:
            for mode in CODINGS:
                frames = longest(ours, part, mode, height, width)
                console.print(f"longest clip at {height} x {width}, {part}, {mode}: {frames} frames")


def longest(model: CogVideoXVAE, part: str, mode: str, height: int, width: int) -> int:
    """Return the most frames of this size that fit, ours alone."""

    def fitting(frames: int) -> bool:
        return fits(model, Case(part, mode, (frames, height, width), torch.bfloat16, "cuda"))

    return largest(fitting)


def add_rows(table: Table, case: Case, model: CogVideoXVAE, their_model: AutoencoderKLCogVideoX) -> None:
    """Measure both sides of a case; one that doesn't fit has no figures."""
    ours = Ours(model, case)
    sides = (Theirs(their_model, case, ours.x), ours)
    found = {side.name: measure(side) for side in sides}
    base = found["diffusers"]
    for side in sides:
        mine = found[side.name]
        if mine is None:
            table.add_row(case.part, case.mode, side.name, "out of memory", "", "", "", "")
            continue
        seconds, peak, result = mine
        ratios = (f"{base[0] / seconds:.2f}", f"{peak / base[1]:.2f}") if base else ("", "")
        error = f"{relative_error(result, base[2]):.1e}" if base and side is ours else ""
        rate = f"{case.size[0] / seconds:.1f}"
        table.add_row(case.part, case.mode, side.name, rate, ratios[0], f"{peak / 2**30:.1f}", ratios[1], error)


def measure(side: Callable[[], torch.Tensor]) -> tuple[float, int, torch.Tensor] | None:
    """Return median seconds, peak bytes above what was there before, and the result on the CPU; None: out of memory."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        result = side().cpu()
        peak = torch.cuda.max_memory_allocated() - before
        times = []
        for _ in range(ROUNDS):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            side()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) / 1e3)
    except torch.OutOfMemoryError:
        return None
    return statistics.median(times), peak, result


def fits(model: CogVideoXVAE, case: Case) -> bool:
    """Say whether a case runs without running out of memory."""
    torch.cuda.empty_cache()
    try:
        Ours(model, case)()
    except torch.OutOfMemoryError:
        return False
    return True


def largest(fitting: Callable[[int], bool]) -> int:
    """Return the most frames 8k + 1 that fit, up to 8 `MOST_PERIODS` + 1; 0: not even one does.

    What fits is taken to be all below a limit: doubled until it doesn't, then halved between.
    """
    if not fitting(1):
        return 0
    low, high = 0, 1
    while high <= MOST_PERIODS and fitting(8 * high + 1):
        low, high = high, 2 * high
    if high > MOST_PERIODS:
        return 8 * low + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fitting(8 * middle + 1) else (low, middle)
    return 8 * low + 1
