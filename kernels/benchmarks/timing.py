"""Time a function on the GPU: events, medians, and inputs that rotate so that no call finds its own in the cache.

The GPU waits before the first event while the host hands over the call, so the time is the card's alone: a kernel of 20
microseconds is launched through some 100 of Python.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from scale import Scale

L2_BYTES = 64 * 2**20  # of the largest card; the rotating inputs are four times as large
WARM_UP = 3  # calls that aren't counted
AHEAD_CYCLES = 4_000_000  # of the GPU's clock, 2 ms: what the host may need to hand over one call
Found = dict[str, Any]
Tensors = tuple[torch.Tensor, ...]
Call = Callable[..., Tensors]


def copies_needed(inputs: Sequence[torch.Tensor]) -> int:
    """Return how many sets of inputs are larger than four caches together."""
    size = sum(x.numel() * x.element_size() for x in inputs)
    return min(16, max(1, -(-4 * L2_BYTES // max(size, 1))))


def time_of(function: Callable[..., Any], sets: Sequence[Sequence[Any]], scale: Scale, repeats: int = 0) -> float:
    """Call `function(*one of the sets)` in turn and return the median milliseconds of a call.

    Args:
        function: what is timed; its results are dropped.
        sets: arguments, each call takes the next ones.
        scale: says whether events of a GPU or the clock measure, and how many calls count.
        repeats: in place of the scale's.
    """
    found = []
    for repeat in range((repeats or scale.repeats) + (0 if scale.is_dry else WARM_UP)):
        arguments = sets[repeat % len(sets)]
        found.append(_on_cpu(function, arguments) if scale.is_dry else _on_gpu(function, arguments))
    return statistics.median(found[0 if scale.is_dry else WARM_UP :])


def _on_gpu(function: Callable[..., Any], arguments: Sequence[Any]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(AHEAD_CYCLES)  # private, and what torch's own tests keep a stream busy with
    begin.record()
    function(*arguments)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def _on_cpu(function: Callable[..., Any], arguments: Sequence[Any]) -> float:
    began = time.perf_counter()
    function(*arguments)
    return (time.perf_counter() - began) * 1e3


def copy_bandwidth(scale: Scale) -> float:
    """Return bytes per second, read and written, of a copy within the card's memory."""
    source = torch.empty(scale.copied, dtype=torch.int16, device=scale.device).random_()
    # Many times, because an idle card's clocks take a while to rise.
    milliseconds = time_of(lambda x, y: y.copy_(x), [(source, torch.empty_like(source))], scale, 10 * scale.repeats)
    return 2 * source.numel() * source.element_size() / (milliseconds * 1e-3)


def share_of(bandwidth: float, least_bytes: float, milliseconds: float) -> float:
    """Return the share of `bandwidth` (bytes per second) that the least traffic came to."""
    return least_bytes / (milliseconds * 1e-3) / bandwidth


def both_ways(
    ways: dict[str, Call], inputs: Tensors, parameters: Tensors, least: tuple[float, float], bandwidth: float,
    scale: Scale,
) -> dict[str, Found]:  # fmt: skip
    """Time forward and backward of several ways to compute the same; one that fails leaves a note, not a hole.

    Args:
        ways: by name; "ms" is ours, whose share of the bandwidth is noted.
        inputs: large tensors, of which copies rotate; `way(*inputs)` is the call.
        parameters: what else has a gradient; it is in the calls already.
        least: bytes that forward and backward have to move: each input read once, each output written once.
        bandwidth: of a copy, bytes per second.
        scale: how to time.

    Returns:
        "forward" and "backward" -> milliseconds by way, "share", and "notes" on the ways that failed.
    """
    found: dict[str, Found] = {"forward": {}, "backward": {}}
    for name, way in ways.items():
        try:
            times = _forward_and_backward(way, inputs, parameters, scale)
        except Exception as error:  # of any backend: out of memory, not built for this card
            for each in found.values():
                each.setdefault("notes", {})[name] = in_short(error)
            continue
        finally:
            release(scale)
        for each, milliseconds, least_bytes in zip(found.values(), times, least, strict=True):
            each[name] = milliseconds
            if name == "ms":
                each["share"] = share_of(bandwidth, least_bytes, milliseconds)
    return found


def _forward_and_backward(way: Call, inputs: Tensors, parameters: Tensors, scale: Scale) -> tuple[float, float]:
    """Forward builds its graph, as in training; backward finds one of its own for each set of inputs."""
    sets = []
    for copy in range(copies_needed(inputs) if not scale.is_dry else 1):
        sets.append(tuple((x.clone() if copy else x).detach().requires_grad_() for x in inputs))
    forward = time_of(way, sets, scale)
    graphs = []
    for leaves in sets:
        outputs = way(*leaves)
        graphs.append((outputs, (*leaves, *parameters), tuple(torch.randn_like(x) for x in outputs)))
    backward = time_of(lambda *graph: torch.autograd.grad(*graph, retain_graph=True), graphs, scale)
    return forward, backward


def release(scale: Scale) -> None:
    """Give the memory of the last measurement back."""
    gc.collect()
    if not scale.is_dry:
        torch.cuda.empty_cache()


def in_short(error: Exception) -> str:
    """Return an error as a cell of a table can hold it."""
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:80]}"
