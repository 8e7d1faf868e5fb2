"""The ops on tokens, `qk_norm_rope`, `adaln_modulate`, `gated_residual_adaln`, beside eager torch and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from scale import Scale
from timing import Call, Found, Tensors, both_ways

from megacogvx_kernels import adaln, qk_norm_rope

BYTES = 2  # of bf16
OPS = ("qk_norm_rope", "adaln_modulate", "gated_residual_adaln")
WAYS = ("forward", "backward")


def size_of(op: str, tokens: int, heads: int, scale: Scale) -> str:
    """Return how the table calls a size."""
    return f"{tokens} tokens x " + (f"{heads} heads" if op == "qk_norm_rope" else f"{heads * scale.head_width}")


def measure(op: str, tokens: int, heads: int, scale: Scale, bandwidth: float, ways: str) -> dict[str, Found]:
    """Time one op at one size, forward and backward.

    Args:
        op: one of `OPS`.
        tokens, heads: its size.
        scale, bandwidth: how to time, and what to compare with.
        ways: "eager" for ours and eager torch, "compile" for torch.compile, "once" for ours alone (under a profiler).
    """
    call, reference, inputs, parameters, least = _PREPARE[op](tokens, heads, scale)
    ours, eager = partial(call, getattr(_PACKAGES[op], op)), partial(call, reference)
    chosen: dict[str, dict[str, Call]] = {
        "once": {"ms": ours},
        "eager": {"ms": ours, "eager": eager},
        "compile": {"compiled": partial(call, torch.compile(reference, dynamic=False, backend=scale.compiler))},
    }
    torch.compiler.reset()  # of other sizes there are too many versions soon
    found = both_ways(chosen[ways], inputs, parameters, least, bandwidth, scale)
    return {f"{op} {way}": found[way] for way in WAYS}


_PACKAGES = dict.fromkeys(OPS, adaln) | {"qk_norm_rope": qk_norm_rope}
Prepared = tuple[Call, Callable[..., Any], Tensors, Tensors, tuple[float, float]]


def _rope(tokens: int, heads: int, scale: Scale) -> Prepared:
    qkv = _random(scale, tokens, heads, 3, scale.head_width)
    vectors = tuple(_parameter(scale, scale.head_width) for _ in range(4))
    table, grid = one_sample(tokens, scale)
    axes = (scale.head_width // 4, *(3 * scale.head_width // 8,) * 2)

    def call(function: Any, qkv: torch.Tensor) -> Tensors:
        found: Tensors = function(qkv, *vectors, table, grid, 0, eps=1e-6, axes=axes, theta=1e4, rotate=True)
        return found

    per_token = heads * scale.head_width * BYTES
    least = (4.0 * tokens * per_token, 7.0 * tokens * per_token)  # backward also writes the zeros of v's gradient
    return call, qk_norm_rope.reference.qk_norm_rope, (qkv,), vectors, least


def one_sample(tokens: int, scale: Scale) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sample table and grid of a pack of one sample, and of the padding that fills it up."""
    area = scale.side**2
    frames = (tokens - scale.text) // area
    end = scale.text + frames * area
    rows = [[0, scale.text, frames, scale.side, scale.side], [end, tokens - end, 0, 0, 0]]
    table = torch.tensor(rows, dtype=torch.int32, device=scale.device)
    return table, torch.tensor([[0.0, 0, 0, 1, 1, 1]] * 2, device=scale.device)


def _adaln(op: str, tokens: int, heads: int, scale: Scale) -> Prepared:
    width, has_branch = heads * scale.head_width, op == "gated_residual_adaln"
    tables = tuple(_parameter(scale, 4, 3, width) for _ in range(1 + has_branch))
    affine = tuple(_parameter(scale, width) for _ in range(2))
    rows = torch.arange(tokens, device=scale.device) * 4 // tokens
    inputs = tuple(_random(scale, tokens, width) for _ in range(1 + has_branch))

    def call(function: Any, *x: torch.Tensor) -> Tensors:
        found = function(*x, *tables[1:], *affine, tables[0], rows, eps=1e-5)
        return found if isinstance(found, tuple) else (found,)

    passes = (4.0, 6.0) if has_branch else (2.0, 3.0)
    least = tuple(tokens * width * BYTES * each for each in passes)
    return call, getattr(adaln.reference, op), inputs, (*affine, *tables), (least[0], least[1])


def _random(scale: Scale, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=scale.device, dtype=scale.dtype)


def _parameter(scale: Scale, *shape: int) -> torch.Tensor:
    return _random(scale, *shape).requires_grad_()


_PREPARE: dict[str, Callable[[int, int, Scale], Prepared]] = {
    "qk_norm_rope": _rope,
    "adaln_modulate": partial(_adaln, "adaln_modulate"),
    "gated_residual_adaln": partial(_adaln, "gated_residual_adaln"),
}
