"""The GPU part of `bench_step.py`: one layer of the 5B model in bf16, forward and backward, on whole packs.

Ours, diffusers' block eager and compiled, in turns; times are medians of CUDA events after a warm-up. TFLOP/s are by
the model FLOPs of `models/transformer/flops.py`, the same for all sides. The attention kernel that ran is named from
the profiler, so the result says whether cuDNN or an FA3-class kernel was at work.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from bench_failures import reason
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
    ("attention", r"sdpa|flash|fmha|attention|dot_do_o|convert_dq"),  # the last two: cuDNN's helpers of the backward
    ("matrix products", r"gemm|cutlass|nvjet|xmma|cublas|splitk"),
    ("norms, modulation, rotation, GELU, copies", r""),
)
GOALS = {0: "goal 55%, 58% with an FA3-class kernel", 1: "goal 47%, 51% with an FA3-class kernel"}
console = Console(width=150)


@dataclass
class Layer:
    """One side: forward on prepared tokens, and how to read the tokens out of its result.

    Attributes:
        name: as printed.
        forward: makes the tokens after the layer.
        leaves: what gets gradients.
        cotangents: the gradient of each of the results; random, since a GPU runs faster on equal numbers.
        tokens: result -> `[S, D]` in the order of the pack, for the comparison.
        predicted: bytes that should be kept between forward and backward; 0 if nothing is predicted.
    """

    name: str
    forward: Callable[[], tuple[torch.Tensor, ...]]
    leaves: list[torch.Tensor]
    cotangents: tuple[torch.Tensor, ...]
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
    length, width, text = case.layout.samples[0].length, config.hidden_size, case.sizes[0][3]
    # the samples hold the same tokens and differ in their condition
    tokens_SD, cotangent_SD = (
        draws.normal((length, width), 0, name).to(case.device, case.dtype) for name in ("tokens", "cotangent")
    )
    condition_ME = draws.normal((samples + 1, config.time_embed_dim), 0, "condition").to(case.device, case.dtype)
    hidden = tokens_SD.repeat(samples, 1)[:, None].requires_grad_()
    cotangents = (cotangent_SD.repeat(samples, 1)[:, None],)
    sides = []
    for policy in ("none", "selective", "keep_attention"):
        model = our_model(case, theirs, groups, policy)
        block, local = model.blocks["0"], case.layout.local(device=case.device)
        condition = condition_ME.clone().requires_grad_()

        def ours(block=block, condition=condition, local=local):  # type: ignore[no-untyped-def]
            return (block(hidden, condition, case.layout, local),)

        predicted = KEPT_PER_TOKEN[policy] * width * samples * length
        leaves = [hidden, condition, *block.parameters()]
        sides.append(Layer(f"megacogvx, {policy}", ours, leaves, cotangents, lambda out: out[0][:, 0], predicted))
    block, rotary = theirs.transformer_blocks[0], rotary_table(case, 0)
    both = [(tokens_SD[part], cotangent_SD[part]) for part in (slice(text, None), slice(None, text))]
    inputs = [tokens.repeat(samples, 1, 1).requires_grad_() for tokens, _ in both]
    cotangents = tuple(cotangent.repeat(samples, 1, 1) for _, cotangent in both)
    condition = condition_ME[:samples].clone().requires_grad_()
    for name, function in (("compiled", torch.compile(block, dynamic=False)), ("eager", block)):

        def diffusers(function=function):  # type: ignore[no-untyped-def]
            return function(*inputs, condition, image_rotary_emb=rotary)

        leaves = [*inputs, condition, *block.parameters()]
        sides.append(Layer(f"diffusers, {name}", diffusers, leaves, cotangents, video_behind_text))
    return sides


def video_behind_text(out: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return the tokens `[S, D]` of a pack from diffusers' (video, text), `[B, tokens, D]` each."""
    return torch.cat(out[::-1], 1).flatten(0, 1)


def step(layer: Layer) -> float:
    """Run forward and backward once; return milliseconds by CUDA events. The gradients are dropped again."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    out = layer.forward()
    torch.autograd.backward(out, layer.cotangents)
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
    torch.autograd.backward(out, layer.cotangents)
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


def ceilings() -> str:
    """Measure what this GPU reaches on random data: a large matrix product in bf16, and a copy; say both."""
    a, b = (draws.normal((8192, 8192), 0, name).to("cuda", torch.bfloat16) for name in "ab")
    product = _median_ms(lambda: a @ b)
    source = a.repeat(32, 1)  # 4 GiB, far more than the L2 cache holds
    target = torch.empty_like(source)
    copied = _median_ms(lambda: target.copy_(source))
    return f"measured here: {2 * 8192**3 / product / 1e9:.0f} TFLOP/s, {2 * source.nbytes / copied / 1e9:.2f} TB/s"


def _median_ms(run: Callable[[], object], rounds: int = 10) -> float:
    times = []
    for _ in range(3 + rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times[3:])


def time_in_turns(sides: list[Layer], rounds: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Return milliseconds of each round by side, and of those that don't run (out of memory, say) the reason."""
    times: dict[str, list[float]] = {side.name: [] for side in sides}
    failed: dict[str, str] = {}
    for round_ in range(WARM_UP + rounds):
        for side in (side for side in sides if side.name not in failed):
            try:
                milliseconds = step(side)
            except RuntimeError as error:  # of the allocator, the compiler or a kernel; the others go on
                failed[side.name] = reason(error)
                release(side)
                continue
            if round_ >= WARM_UP:
                times[side.name].append(milliseconds)
    return times, failed


def medians(times: dict[str, list[float]]) -> str:
    """Return the medians in a line, printed before all else: what ends the process then costs the remarks alone."""
    return ", ".join(f"{name} {statistics.median(found):.1f} ms" for name, found in times.items() if found)


def tokens_of(layer: Layer) -> torch.Tensor | None:
    """Return the tokens `[S, D]` after a side's forward pass alone, or None where not even that runs."""
    try:
        with torch.no_grad():
            return layer.tokens(layer.forward())
    except RuntimeError:
        torch.cuda.empty_cache()
        return None


def release(layer: Layer) -> None:
    """Free what a failed run left."""
    drop_gradients(layer)
    torch.cuda.empty_cache()


def largest_error(tokens_SD: torch.Tensor, reference_SD: torch.Tensor, samples: int) -> float:
    """Return the largest relative error of a sample; one at a time, since it is computed in fp64."""
    pairs = zip(tokens_SD.chunk(samples), reference_SD.chunk(samples), strict=True)
    return max(relative_error(a, b) for a, b in pairs)


def row(side: Layer, times: list[float], flops: int, error: str) -> tuple[list[str], str]:
    """Return a row of the table, and the time by part as text."""
    kept, peak = kept_and_peak(side)
    median = statistics.median(times)
    rate = flops / median / 1e9
    off = f"{side.predicted / 2**30:.2f} ({kept / side.predicted - 1:+.1%})" if side.predicted else ""
    parts, kernel = time_by_part(side)
    shares = ", ".join(f"{part} {milliseconds:.1f} ms" for part, milliseconds in parts.items())
    cells = [
        side.name, f"{median:.1f}", f"{(max(times) - min(times)) / median:.1%}", f"{rate:.0f}",
        f"{rate / PEAK_TFLOPS:.1%}", f"{kept / 2**30:.2f}", off, f"{peak / 2**30:.2f}", error,
    ]  # fmt: skip
    return cells, f"{side.name}: {shares}; attention kernel: {kernel}"


def measure(number: int, groups: ParallelGroups) -> None:
    """Measure one of `PACKS` and print its table."""
    samples, latents, rounds = PACKS[number]
    case = case_of(samples, latents)
    flops = block_flops(case.config, case.layout)
    length = case.layout.samples[0].length
    table = Table(title=f"{samples} x {length:,} tokens, {flops / 1e12:.4g} TFLOP; {GOALS.get(number, '')}")
    for name in ("side", "ms", "spread", "TFLOP/s", "of 989", "GiB kept", "predicted", "peak GiB", "rel. error"):
        table.add_column(name, justify="left" if name == "side" else "right")
    sides, notes = layers(case, groups), []
    times, failed = time_in_turns(sides, rounds)
    console.print(medians(times), highlight=False)
    reference = tokens_of(sides[-1])  # diffusers', eager, also where its backward pass doesn't fit
    for side in sides[::-1]:
        if side.name not in failed:
            try:
                tokens = tokens_of(side) if side is not sides[-1] else None
                is_compared = tokens is not None and reference is not None
                error = f"{largest_error(tokens, reference, samples):.1e}" if is_compared else ""
                del tokens
                cells, note = row(side, times[side.name], flops, error)
                table.add_row(*cells)
                notes.append(note)
                continue
            except RuntimeError as problem:
                failed[side.name] = reason(problem)
                release(side)
        table.add_row(side.name, failed[side.name])
    console.print(table)
    console.print("\n".join(notes), highlight=False)


def main(packs: Sequence[int] = range(len(PACKS))) -> None:
    """Measure some of `PACKS`, or say that nothing was measured."""
    if not torch.cuda.is_available():
        return console.print("not measured: this machine has no GPU")
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {ceilings()}", highlight=False)
    groups = initialize(ParallelConfig(device="cuda"))
    for number in packs:
        measure(number, groups)
        torch.cuda.empty_cache()
