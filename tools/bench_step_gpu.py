"""The GPU part of `bench_step.py`: one layer of the 5B model in bf16, forward and backward, on whole packs.

Ours, diffusers' block eager and compiled, in turns; times are medians of CUDA events after a warm-up. TFLOP/s are by
the model FLOPs of `models/transformer/flops.py`, the same for all sides. The attention kernel that ran is named from
the profiler, so the result says whether cuDNN or an FA3-class kernel was at work.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from bench_step_sides import Case, diffusers_model, our_model, rotary_table
from rich.console import Console
from rich.table import Table

from megacogvx import draws
from megacogvx.models.transformer import CogVideoXConfig
from megacogvx.models.transformer.flops import training_flops
from megacogvx.pack_layout import PackLayout
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.groups import ParallelGroups, initialize
from megacogvx.testing.tolerance import relative_error

PEAK_TFLOPS = 989.4  # dense bf16 of an H100 or H200
TEXT = 226
# (samples, (T, H, W) of the latents, rounds): 6 s at 256 x 384 and 480 x 720, 10 s at 768 x 1360, all at 8 fps
PACKS = ((5, (13, 32, 48), 20), (4, (13, 60, 90), 10), (1, (21, 96, 170), 5), (8, (21, 96, 170), 2))
WARM_UP = 2  # rounds; the first compiles
# What is kept of a token between forward and backward of a layer of width D in bf16, in bytes / D, where the
# elementwise ops are fused (x, modulated, q k v, q' k', attention, branch, x', modulated', fc1, branch').
KEPT_PER_TOKEN = {"none": 32.0, "selective": 24.0, "keep_attention": 4.0, "full": 2.0}
PARTS = (  # part -> what the names of its kernels hold; the first that fits counts
    ("attention", r"sdpa|flash|fmha|attention"),
    ("matrix products", r"gemm|cutlass|nvjet|xmma|cublas|splitk"),
    ("norms, modulation, rotation, GELU, copies", r""),
)
GOALS = {0: "goal 55%, 58% with an FA3-class kernel", 1: "goal 47%, 51% with an FA3-class kernel"}
console = Console(width=150)


@dataclass
class Layer:
    """One side: forward on prepared tokens, and how to read the video tokens out of its result.

    Attributes:
        name: as printed.
        forward: makes the tokens after the layer.
        leaves: what gets gradients.
        tokens: result -> `[S, D]` in the order of the pack, for the comparison.
        note: such as the bytes that should be kept.
    """

    name: str
    forward: Callable[[], tuple[torch.Tensor, ...]]
    leaves: list[torch.Tensor]
    tokens: Callable[[tuple[torch.Tensor, ...]], torch.Tensor]
    predicted: float = 0.0


def block_flops(config: CogVideoXConfig, layout: PackLayout) -> int:
    """Return the model FLOPs of forward and backward of one block: what one more of them adds."""
    two, one = (config.model_copy(update={"num_layers": layers}) for layers in (2, 1))
    return training_flops(two, layout) - training_flops(one, layout)


def part_of(kernel: str) -> str:
    """Return which of `PARTS` a kernel belongs to."""
    return next(part for part, names in PARTS if re.search(names, kernel, re.IGNORECASE))


def case_of(samples: int, latents: tuple[int, int, int]) -> Case:
    """Return one layer of the 5B model on a pack of equal samples."""
    config = CogVideoXConfig(preset="cogvideox_5b", num_layers=1, sample_height=96, sample_width=170)
    return Case(config, ((*latents, TEXT),) * samples, torch.bfloat16, "cuda")


def layers(case: Case, groups: ParallelGroups) -> list[Layer]:
    """Return ours under each recompute policy that changes the time, then diffusers' eager and compiled."""
    config, samples = case.config, len(case.sizes)
    theirs = diffusers_model(case)
    length, width = case.layout.samples[0].length, config.hidden_size
    # the samples hold the same tokens and differ in their condition
    tokens_SD = draws.normal((length, width), 0, "tokens").to(case.device, case.dtype)
    condition_ME = draws.normal((samples + 1, config.time_embed_dim), 0, "condition").to(case.device, case.dtype)
    hidden = tokens_SD.repeat(samples, 1)[:, None].requires_grad_()
    sides = []
    for policy in ("none", "selective", "keep_attention"):
        model = our_model(case, theirs, groups, policy)
        block, local = model.blocks["0"], case.layout.local(device=case.device)
        condition = condition_ME.clone().requires_grad_()

        def ours(block=block, condition=condition, local=local):  # type: ignore[no-untyped-def]
            return (block(hidden, condition, case.layout, local),)

        predicted = KEPT_PER_TOKEN[policy] * width * samples * length
        leaves = [hidden, condition, *block.parameters()]
        sides.append(Layer(f"megacogvx, {policy}", ours, leaves, lambda out: out[0][:, 0], predicted))
    block, rotary = theirs.transformer_blocks[0], rotary_table(case, 0)
    video, text = (part.repeat(samples, 1, 1).requires_grad_() for part in (tokens_SD[TEXT:], tokens_SD[:TEXT]))
    condition = condition_ME[:samples].clone().requires_grad_()
    for name, function in (("eager", block), ("compiled", torch.compile(block, dynamic=False))):

        def diffusers(function=function):  # type: ignore[no-untyped-def]
            return function(video, text, condition, image_rotary_emb=rotary)

        leaves = [video, text, condition, *block.parameters()]
        sides.append(Layer(f"diffusers, {name}", diffusers, leaves, lambda out: torch.cat(out[::-1], 1).flatten(0, 1)))
    return sides


def step(layer: Layer) -> float:
    """Run forward and backward once; return milliseconds by CUDA events. The gradients are dropped again."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    out = layer.forward()
    torch.autograd.backward(out, [torch.ones_like(tensor) for tensor in out])
    stop.record()
    torch.cuda.synchronize()
    drop_gradients(layer)
    return start.elapsed_time(stop)


def drop_gradients(layer: Layer) -> None:
    """Free the gradients of the leaves."""
    for leaf in layer.leaves:
        leaf.grad = None


def kept_and_peak(layer: Layer) -> tuple[int, int]:
    """Return the bytes kept between forward and backward, and the most held at a time, without leaves and weights."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = layer.forward()
    kept = torch.cuda.memory_allocated() - before
    torch.autograd.backward(out, [torch.ones_like(tensor) for tensor in out])
    drop_gradients(layer)
    return kept, torch.cuda.max_memory_allocated() - before


def time_by_part(layer: Layer) -> tuple[dict[str, float], str]:
    """Return milliseconds by part of one forward and backward, and the name of the longest attention kernel."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step(layer)
    parts, kernels = {part: 0.0 for part, _ in PARTS}, {}
    for event in profiler.key_averages():
        parts[part_of(event.key)] += event.self_device_time_total / 1e3
        if part_of(event.key) == "attention":
            kernels[event.key] = event.self_device_time_total
    return parts, max(kernels, key=lambda name: kernels[name], default="none")


def measure(number: int, groups: ParallelGroups) -> None:
    """Measure one of `PACKS` and print its table."""
    samples, latents, rounds = PACKS[number]
    case = case_of(samples, latents)
    flops = block_flops(case.config, case.layout)
    length = case.layout.samples[0].length
    table = Table(title=f"{samples} x {length:,} tokens, {flops / 1e12:.0f} TFLOP; {GOALS.get(number, '')}")
    for name in ("side", "ms", "spread", "TFLOP/s", "of 989", "GiB kept", "predicted", "peak GiB", "rel. error"):
        table.add_column(name, justify="left" if name == "side" else "right")
    sides, reference, times, failed = layers(case, groups), None, {}, {}
    for round_ in range(WARM_UP + rounds):
        for side in (side for side in sides if side.name not in failed):
            try:
                milliseconds = step(side)
            except torch.OutOfMemoryError:
                failed[side.name] = "out of memory"
                drop_gradients(side)
                torch.cuda.empty_cache()
                continue
            if round_ >= WARM_UP:
                times.setdefault(side.name, []).append(milliseconds)
    notes = []
    for side in [*sides[3:], *sides[:3]]:  # diffusers first, so that ours have something to be compared with
        if side.name in failed:
            table.add_row(side.name, failed[side.name])
            continue
        with torch.no_grad():
            tokens = side.tokens(side.forward())
        reference = tokens if side.name == "diffusers, eager" else reference
        error = relative_error(tokens, reference) if reference is not None and tokens is not reference else None
        kept, peak = kept_and_peak(side)
        median = statistics.median(times[side.name])
        rate = flops / median / 1e9
        table.add_row(
            side.name, f"{median:.1f}", f"{(max(times[side.name]) - min(times[side.name])) / median:.1%}",
            f"{rate:.0f}", f"{rate / PEAK_TFLOPS:.1%}", f"{kept / 2**30:.2f}",
            f"{side.predicted / 2**30:.2f}" if side.predicted else "", f"{peak / 2**30:.2f}",
            "" if error is None else f"{error:.1e}",
        )  # fmt: skip
        parts, kernel = time_by_part(side)
        shares = ", ".join(f"{part} {milliseconds:.1f} ms" for part, milliseconds in parts.items())
        notes.append(f"{side.name}: {shares}; attention kernel: {kernel}")
    console.print(table)
    console.print("\n".join(notes), highlight=False)


def main() -> None:
    """Measure every pack, or say that nothing was measured."""
    if not torch.cuda.is_available():
        return console.print("not measured: this machine has no GPU")
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", highlight=False)
    groups = initialize(ParallelConfig(device="cuda"))
    for number in range(len(PACKS)):
        measure(number, groups)
        torch.cuda.empty_cache()
