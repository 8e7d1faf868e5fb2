"""The GPU's part of `bench_vae.py`: frames/s and peak memory in bf16, and the longest clip that fits.

Ours beside diffusers, the same weights, coding and inputs; a side that can't be run is told so. Times are medians
of CUDA events after a warm-up, peaks those of torch's allocator above weights and input. Each row is printed as soon
as it is measured: a machine that is lent for minutes may be gone before the last one. Parts, longest first:

    python tools/bench_vae.py --gpu --modes whole chunked tiled            480 x 720, 49 frames
    python tools/bench_vae.py --gpu --sizes 161x768x1360 --rounds 1         add --cases decode --modes chunked for one
    python tools/bench_vae.py --gpu --longest --modes whole                 the longest clips, by prediction and trial

Decoding takes 17 MFLOP a pixel: 0.3 PFLOP for 49 x 480 x 720, 2.9 for 161 x 768 x 1360. For one H100 or H200.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace

import torch
from bench_failures import reason
from bench_vae_sides import Case, Ours, Theirs, diffusers_model, our_model
from diffusers import AutoencoderKLCogVideoX
from rich.console import Console

from megacogvx.models.vae import CogVideoXVAE, VAEConfig
from megacogvx.testing.tolerance import relative_error

SIZES = ((49, 480, 720), (161, 768, 1360))
TRIED = (9, 25)  # frames of the two clips that the longest one is predicted from
STEP = 8  # frames between two lengths that come back
SLACK = 0.02  # of the predicted length: the longest clip is found to within this
MOST_FRAMES = 4097  # nobody asks for more; of chunks the peak grows by little more than input and result
Size = tuple[int, int, int]
console = Console(width=150)


def main(arguments: argparse.Namespace) -> None:
    """Print a row for each case and side, or the longest clips."""
    if not torch.cuda.is_available():
        raise SystemExit("--gpu: torch sees no CUDA device")
    ours = our_model(VAEConfig(preset=arguments.preset), torch.bfloat16, "cuda")
    free = torch.cuda.mem_get_info()[0] / 2**30
    console.print(f"{torch.cuda.get_device_name()}, {free:.0f} GiB free; torch {torch.__version__}", highlight=False)
    sizes = list(arguments.sizes or (SIZES if arguments.longest else SIZES[:1]))
    theirs = None if arguments.longest else diffusers_model(ours)
    for size in sizes:
        for part in arguments.cases:
            for mode in arguments.modes:
                case = Case(part, mode, size, torch.bfloat16, "cuda")
                if theirs is None:
                    console.print(
                        f"{part}, {mode}, {size[1]} x {size[2]}: {said_of_longest(ours, case)}", highlight=False
                    )
                else:
                    compare(case, ours, theirs, arguments.rounds)


def compare(case: Case, model: CogVideoXVAE, their_model: AutoencoderKLCogVideoX, rounds: int) -> None:
    """Measure both sides of a case and print them; one that doesn't fit has no figures."""
    ours = Ours(model, case)
    console.print(str(case), style="bold", highlight=False)
    base = None
    for side in (Theirs(their_model, case, ours.x), ours):
        found = measure(side, rounds)
        if isinstance(found, str):
            console.print(f"  {side.name:10} {found}", highlight=False)
            continue
        seconds, peak, result = found
        text = f"  {side.name:10} {seconds:8.3f} s  {case.size[0] / seconds:8.1f} frames/s  {peak / 2**30:6.2f} GiB"
        if side is ours and base is not None:
            error = relative_error(result, base[2])
            text += f"  {base[0] / seconds:.2f}x as fast, {peak / base[1]:.2f}x the memory, relative error {error:.1e}"
        console.print(text, highlight=False)
        base = found


def measure(side: Callable[[], torch.Tensor], rounds: int) -> tuple[float, int, torch.Tensor] | str:
    """Return median seconds, peak bytes above what was there before, and the result on the CPU; or why there is none.

    Beside memory it may be a kernel: some count elements in 32 bits, and 128 channels x 49 x 480 x 720 are more.
    """
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        result = side().cpu()
        peak = torch.cuda.max_memory_allocated() - before
        times = []
        for _ in range(rounds):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            side()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) / 1e3)
    except RuntimeError as error:
        return reason(error)
    return statistics.median(times), peak, result


def said_of_longest(model: CogVideoXVAE, case: Case) -> str:
    """Return what `longest` finds, or why it can't; the other cases go on."""
    try:
        return longest(model, case)
    except RuntimeError as error:
        return reason(error)


def longest(model: CogVideoXVAE, case: Case) -> str:
    """Say how many frames of the case's size fit, ours alone: predicted by a line through two peaks, then tried.

    The trials are of whole clips alone: in chunks they would take minutes each, and the line is exact.
    """

    def peak(frames: int) -> int | None:
        """Return the peak with the input, in bytes; None: out of memory."""
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        try:
            Ours(model, replace(case, size=(frames, *case.size[1:])))()
        except torch.OutOfMemoryError:
            return None
        return torch.cuda.max_memory_allocated() - before

    peaks = [peak(frames) for frames in TRIED]
    if peaks[0] is None or peaks[1] is None:
        return f"fewer than {TRIED[peaks[0] is not None]} frames"
    torch.cuda.empty_cache()
    predicted = on_line(TRIED, (peaks[0], peaks[1]), torch.cuda.mem_get_info()[0])
    if case.coding.latents_per_chunk is not None:
        return f"{predicted} frames predicted from the peaks of {TRIED[0]} and {TRIED[1]}, not tried"
    found = largest(lambda frames: peak(frames) is not None, predicted)
    return f"{found} frames fit, {predicted} predicted"


def on_line(frames: tuple[int, int], peaks: tuple[int, int], free: int) -> int:
    """Return the most frames 8k + 1, up to `MOST_FRAMES`, whose peak keeps below `free` on a line through two peaks."""
    slope = (peaks[1] - peaks[0]) / (frames[1] - frames[0])
    if slope <= 0:
        return MOST_FRAMES
    most = frames[0] + (free - peaks[0]) / slope
    return max(1, min(MOST_FRAMES, int(most - 1) // STEP * STEP + 1))


def largest(fitting: Callable[[int], bool], predicted: int) -> int:
    """Return the most frames 8k + 1 that fit, to within `SLACK` of what was predicted; 0: not even one does.

    What fits is taken to be all below a limit, which is near the prediction: a run takes seconds to minutes.
    """
    step = max(STEP, int(SLACK * predicted) // STEP * STEP)
    frames = predicted
    if fitting(frames):
        while frames + step <= MOST_FRAMES and fitting(frames + step):
            frames += step
        return frames
    while frames > 1:
        frames = max(1, frames - step)
        if fitting(frames):
            return frames
    return 0
