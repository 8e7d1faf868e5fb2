"""What run_all.py measures: one function per row of its table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import run_all
import torch
import torch.nn.functional as F
from timing import time_of

from megacogvx.testing.kernel_cases import adaln_arguments, rope_arguments, run_with_gradients, widened
from megacogvx.testing.tolerance import assert_close
from megacogvx_kernels import adaln, causal_halo, compiled, group_norm_moments, qk_norm_rope
from megacogvx_kernels.adaln.runs import runs_of

DEVICE, DTYPE, BYTES, WIDTH = "cuda", torch.bfloat16, 2, run_all.WIDTH
COMPILED_SIZE = (75_000, 48)  # tokens and heads at which torch.compile is timed: it takes its time
Measure = Callable[[], dict[str, float]]


def check(shapes: int = 40) -> None:
    """Hold the kernels to the references in fp64 on random shapes, before anything is timed.

    Raises:
        AssertionError: a kernel is off.
    """
    assert "cuda" in compiled.available(), "the compiled ops have no CUDA kernels"
    for seed in range(shapes):
        rope, plain = rope_arguments(seed, widths=(8, 64, 72, 128)), qk_norm_rope.reference.qk_norm_rope
        _check(qk_norm_rope.qk_norm_rope, rope, partial(plain, rotate=True), seed)
        norm = adaln_arguments(seed, dtype=torch.float32, widths=(64, 200, 3072))
        _check(adaln.gated_residual_adaln, norm, adaln.reference.gated_residual_adaln, seed)


def planned(bandwidth: float) -> dict[str, Measure]:
    """Return the name of every row of the table and the function that measures it."""
    rows: dict[str, Measure] = {}
    for name, (op, size) in {f"{op}: {size}": (op, size) for op, size in run_all.ROWS}.items():
        kind, *rest = op.split(" ")
        if kind in _TOKEN_OPS:
            tokens, columns = (int(word) for word in size.split() if word.isdigit())
            heads = columns if kind == "qk_norm_rope" else columns // WIDTH
            rows[name] = partial(_TOKEN_OPS[kind], rest[-1] == "backward", tokens, heads, bandwidth)
        elif kind == "group_norm_moments":
            rows[name] = partial(_group_norm, rest[-1] == "backward", size.endswith("last"), bandwidth)
        elif kind == "attention":
            samples, tokens = (int(word) for word in size.split() if word.isdigit())
            rows[name] = partial(_attention, op.split(", ")[1], samples, tokens)
        else:
            rows[name] = partial(_halo_pack, bandwidth) if kind == "causal_halo" else _virtual_ranks
    return rows


# ---------------------------------------------------------------------------------------------------- tokens


def _rope(is_backward: bool, tokens: int, heads: int, bandwidth: float) -> dict[str, float]:
    qkv = torch.randn(tokens, heads, 3, WIDTH, device=DEVICE, dtype=DTYPE)
    vectors = [torch.randn(WIDTH, device=DEVICE, dtype=DTYPE) for _ in range(4)]
    side = 50
    frames = (tokens - 226) // (side * side)
    rows = [[0, 226, frames, side, side]]
    rows.append([226 + frames * side * side, tokens - 226 - frames * side * side, 0, 0, 0])
    table = torch.tensor(rows, dtype=torch.int32, device=DEVICE)
    grid = torch.tensor([[0.0, 0, 0, 1, 1, 1]] * 2, device=DEVICE)

    def call(function: Any, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found: tuple[torch.Tensor, ...] = function(
            qkv, *vectors, table, grid, 0, eps=1e-6, axes=(16, 24, 24), theta=1e4, rotate=True
        )
        return found

    per_token = heads * WIDTH * BYTES
    least = tokens * per_token * (7 if is_backward else 4)  # backward also writes the zeros of v's gradient
    functions = (qk_norm_rope.qk_norm_rope, qk_norm_rope.reference.qk_norm_rope)
    return _three_ways(call, functions, (qkv,), is_backward, least, bandwidth, (tokens, heads) == COMPILED_SIZE)


def _adaln(op: str, is_backward: bool, tokens: int, heads: int, bandwidth: float) -> dict[str, float]:
    width, has_branch = heads * WIDTH, op == "gated_residual_adaln"
    tables = [torch.randn(4, 3, width, device=DEVICE, dtype=DTYPE) for _ in range(2)]
    affine = [torch.randn(width, device=DEVICE, dtype=DTYPE) for _ in range(2)]
    rows = torch.arange(tokens, device=DEVICE) * 4 // tokens
    runs_of(rows, 4)
    inputs = tuple(torch.randn(tokens, width, device=DEVICE, dtype=DTYPE) for _ in range(1 + has_branch))

    def call(function: Any, *x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        gates = (tables[1],) if has_branch else ()
        found = function(*x, *gates, *affine, tables[0], rows, eps=1e-5)
        return found if isinstance(found, tuple) else (found,)

    passes = {(False, False): 2, (False, True): 3, (True, False): 4, (True, True): 6}[has_branch, is_backward]
    functions = (getattr(adaln, op), getattr(adaln.reference, op))
    least = tokens * width * BYTES * passes
    return _three_ways(call, functions, inputs, is_backward, least, bandwidth, (tokens, heads) == COMPILED_SIZE)


_TOKEN_OPS: dict[str, Callable[..., dict[str, float]]] = {
    "qk_norm_rope": _rope,
    "adaln_modulate": partial(_adaln, "adaln_modulate"),
    "gated_residual_adaln": partial(_adaln, "gated_residual_adaln"),
}


def _three_ways(
    call: Any, functions: Sequence[Any], inputs: tuple[torch.Tensor, ...], is_backward: bool, least: float,
    bandwidth: float, with_compile: bool,
) -> dict[str, float]:  # fmt: skip
    """Time the op, its reference eagerly, and its reference under torch.compile."""
    kernel, reference = functions
    ways = {"ms": partial(call, kernel), "eager": partial(call, reference)}
    if with_compile:
        ways["compiled"] = partial(call, torch.compile(reference, dynamic=False))
    found = {}
    for name, way in ways.items():
        timed = _time(way, inputs, is_backward, least)
        found[name] = timed.milliseconds
        if name == "ms":
            found["share"] = timed.share_of(bandwidth)
    return found


def _time(way: Any, inputs: tuple[torch.Tensor, ...], is_backward: bool, least: float) -> Any:
    if not is_backward:
        with torch.no_grad():
            return time_of(way, inputs, least)
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = way(*leaves)
    pulls = tuple(torch.randn_like(x) for x in outputs)
    return time_of(lambda *g: torch.autograd.grad(outputs, leaves, g, retain_graph=True), pulls, least)


# ----------------------------------------------------------------------------------------------------- clips


def _group_norm(is_backward: bool, is_last: bool, bandwidth: float) -> dict[str, float]:
    layout = torch.channels_last_3d if is_last else torch.contiguous_format
    x = torch.randn(1, 128, 17, 240, 360, device=DEVICE, dtype=DTYPE).to(memory_format=layout)
    affine = [torch.randn(128, device=DEVICE, dtype=DTYPE) for _ in range(2)]

    def call(function: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (function(x, *affine, 32, 1e-6, True),)

    functions = (group_norm_moments.group_norm_moments, group_norm_moments.reference.group_norm_moments)
    least = x.numel() * BYTES * (5 if is_backward else 3)
    return _three_ways(call, functions, (x,), is_backward, least, bandwidth, not is_last)


def _halo_pack(bandwidth: float) -> dict[str, float]:
    from megacogvx_kernels.causal_halo.frames import last_frames

    x = torch.randn(2, 128, 17, 240, 360, device=DEVICE, dtype=DTYPE)
    least = 2 * x[:, :, -2:].numel() * BYTES
    timed = time_of(lambda x: last_frames(x[:, :, -2:], torch.contiguous_format), (x,), least)
    eager = time_of(lambda x: x[:, :, -2:].contiguous(), (x,), least)
    return {"ms": timed.milliseconds, "share": timed.share_of(bandwidth), "eager": eager.milliseconds}


def _virtual_ranks(ranks: int = 4, size: int = 2) -> dict[str, float]:
    """One process plays every rank, each on a stream: the halo is copied while the interior is convolved.

    Raises:
        AssertionError: the frames that arrive aren't the ones that were sent, or the convolution is off.
    """
    torch.backends.cudnn.deterministic = True
    x = torch.randn(1, 128, 16, 120, 180, device=DEVICE, dtype=DTYPE)
    weight = torch.randn(128, 128, size + 1, 3, 3, device=DEVICE, dtype=DTYPE) / 60
    shards, streams = list(x.chunk(ranks, dim=2)), [torch.cuda.Stream() for _ in range(ranks)]
    convolve = partial(F.conv3d, weight=weight, padding=(0, 1, 1))

    def spread(*shards: torch.Tensor) -> list[torch.Tensor]:
        done = []
        for rank, (shard, stream) in enumerate(zip(shards, streams, strict=True)):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                previous = shards[rank - 1][:, :, -size:].contiguous() if rank else None
                front = causal_halo.causal_halo(shard[:, :, :size], size, previous)
                done.append(torch.cat([convolve(front), convolve(shard)], dim=2))
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)
        return done

    whole = convolve(causal_halo.causal_halo(x, size))
    assert_close(torch.cat(spread(*shards), dim=2), whole, 2e-3, "convolution over virtual ranks")
    eager = time_of(convolve, (F.pad(x, (0, 0, 0, 0, size, 0)),))  # one rank with everything
    return {"ms": time_of(spread, shards).milliseconds, "eager": eager.milliseconds}


# ------------------------------------------------------------------------------------------------- attention


def _attention(how: str, samples: int, tokens: int) -> dict[str, float]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    qkv = [torch.randn(samples * tokens, 48, WIDTH, device=DEVICE, dtype=DTYPE) for _ in range(3)]
    backend = {"cuDNN per sample": SDPBackend.CUDNN_ATTENTION, "flash per sample": SDPBackend.FLASH_ATTENTION}.get(how)

    def per_sample(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        parts = zip(*(x.transpose(0, 1)[None].split(tokens, dim=2) for x in (q, k, v)), strict=True)
        with sdpa_kernel([backend]):
            return torch.cat([F.scaled_dot_product_attention(*part) for part in parts], dim=2)

    def varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn

        ends = torch.arange(samples + 1, device=DEVICE, dtype=torch.int32) * tokens
        found: torch.Tensor = varlen_attn(q, k, v, ends, ends, tokens, tokens)
        return found

    attend = per_sample if backend else varlen

    def both(*x: torch.Tensor) -> None:
        leaves = [each.detach().requires_grad_() for each in x]
        out = attend(*leaves)
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    return {"ms": time_of(both, qkv, repeats=5).milliseconds}


def _check(function: Any, arguments: dict[str, Any], reference: Any, seed: int) -> None:
    on_gpu = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    results, gradients = run_with_gradients(function, on_gpu, seed)
    expected, expected_gradients = run_with_gradients(reference, widened(arguments), seed)
    bound = 5e-5 if results[0].dtype == torch.float32 else 8e-3
    for i, (actual, wanted) in enumerate(zip(results, expected, strict=True)):
        assert_close(actual.cpu(), wanted, bound, f"result {i} of case {seed}")
    for name, gradient in gradients.items():
        assert_close(gradient.cpu(), expected_gradients[name], bound, f"gradient of {name} of case {seed}")
