"""Random arguments for the ops of megacogvx_kernels: shapes, tables and layouts that a pack may bring, and odd ones.

Needs torch alone, as the kernels do, so that kernels/benchmarks runs on a machine that has nothing else.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
EPSILON = {torch.float64: 2e-16, torch.float32: 1.2e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def tolerance(dtype: torch.dtype, sums: int = 1) -> float:
    """Return the relative error that rounding explains: some operations in fp32 or better, then one cast.

    Args:
        dtype: of the result.
        sums: how many numbers are added up for one.
    """
    operations = EPSILON[torch.promote_types(dtype, torch.float32)] * (16 + sums**0.5)
    return operations + (EPSILON[dtype] if dtype in (torch.bfloat16, torch.float16) else 0.0)


def normal(shape: tuple[int, ...], seed: int, what: str, place: int = 0) -> torch.Tensor:
    """Draw a fp32 CPU tensor of `shape` from N(0, 1), a function of the other arguments alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {what} {place}".encode()))
    return torch.randn(shape, generator=generator)


def rope_arguments(seed: int, dtype: torch.dtype | None = None, widths: Sequence[int] = ()) -> dict[str, Any]:
    """Return arguments of `qk_norm_rope`: one to five samples, some without text or video, a shard of their tokens.

    Args:
        seed: decides everything.
        dtype: of qkv and the parameters; None: any that a kernel takes.
        widths: to choose the head's from; (): any even number up to 128.
    """
    chosen = random.Random(seed)
    dtype = dtype or chosen.choice(FLOATS)
    width = chosen.choice(widths or (8, 16, 24, 64, 64, 64, 72, 128, 6, 12, 34))
    heads = chosen.choice((1, 2, 3, 5))
    t, h = (2 * chosen.randrange(width // 2 + 1) for _ in range(2))
    axes = (t, h, width - t - h) if t + h <= width else (width, 0, 0)
    table, end = [], 0
    for _ in range(chosen.randint(1, 5)):
        text, grid = chosen.choice((0, 3, 17)), [chosen.randint(0, 4) for _ in range(3)]
        table.append([end, text, *grid])
        end += text + grid[0] * grid[1] * grid[2]
    table.append([end, 5, 0, 0, 0])  # the padding
    end += 5
    offset = chosen.randrange(end)
    tokens = chosen.randint(1, end - offset)
    grid_M6 = torch.tensor([[*(chosen.uniform(-3, 60) for _ in range(3)), 1.0, 0.5, 1.25] for _ in table])
    names = ("q_weight_K", "q_bias_K", "k_weight_K", "k_bias_K")
    return {
        "qkv_SN3K": _laid_out(chosen, normal((tokens, heads, 3, width), seed, "qkv").to(dtype)),
        **{name: normal((width,), seed, name).to(dtype) for name in names},
        "sample_table_M5": torch.tensor(table, dtype=chosen.choice((torch.int32, torch.int64))),
        "rope_grid_M6": grid_M6,
        "token_offset": offset,
        "axes": axes,
        "theta": 10000.0,
        "eps": 1e-6,
    }


def adaln_arguments(seed: int, dtype: torch.dtype | None = None, widths: Sequence[int] = ()) -> dict[str, Any]:
    """Return arguments of `gated_residual_adaln`: rows in runs or in any order, some rows without a token.

    Args:
        seed: decides everything.
        dtype: of the tokens; the parameters and tables are of theirs or fp32. None: any that a kernel takes.
        widths: to choose D from; (): any up to 200.
    """
    chosen = random.Random(seed)
    dtype = dtype or chosen.choice(FLOATS)
    width, tokens = chosen.choice(widths or (8, 12, 64, 96, 137, 200)), chosen.randint(1, 90)
    num_rows = 2 * chosen.randint(1, 4)
    rows = [chosen.randrange(num_rows) for _ in range(tokens)]
    if chosen.random() < 0.7:
        rows.sort(key=lambda row: (row // 2, -row))  # as in a pack: each sample's text, then its video
    other = dtype if dtype == torch.float64 else chosen.choice((dtype, torch.float32))
    draw = {name: normal(shape, seed, name) for name, shape in (
        ("residual_SD", (tokens, width)), ("branch_SD", (tokens, width)),
        ("gate_modulation_R3D", (num_rows, 3, width)), ("weight_D", (width,)), ("bias_D", (width,)),
        ("modulation_R3D", (num_rows, chosen.choice((2, 3)), width)),
    )}  # fmt: skip
    return {
        **{name: x.to(dtype if name.endswith("SD") else other) for name, x in draw.items()},
        "rows_S": torch.tensor(rows, dtype=chosen.choice((torch.int64, torch.int32))),
        "eps": 1e-5,
    }


def run_with_gradients(
    function: Callable[..., Any], arguments: dict[str, Any], seed: int
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Call `function` and pull random gradients back through it; they are bf16 numbers, the same for every dtype.

    Returns:
        its results, and the gradient of every floating argument that has one, by name.
    """
    leaves = {
        name: value.detach().clone().requires_grad_() if value.is_contiguous() else value.detach().requires_grad_()
        for name, value in arguments.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and name != "rope_grid_M6"
    }
    results = function(**{**arguments, **leaves})
    results = list(results) if isinstance(results, tuple) else [results]
    pulls = [normal(tuple(x.shape), seed, "pull", i).bfloat16().to(x) for i, x in enumerate(results)]
    found = torch.autograd.grad(results, list(leaves.values()), pulls, allow_unused=True)
    gradients = {name: x for name, x in zip(leaves, found, strict=True) if x is not None}
    return [x.detach() for x in results], gradients


def widened(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the same arguments in fp64, where rounding is out of the way."""
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def _laid_out(chosen: random.Random, x: torch.Tensor) -> torch.Tensor:
    """Return x as it is, or as rows of a wider tensor (what a cut by rows of a linear layer's output looks like)."""
    if chosen.random() < 0.6:
        return x
    wide = torch.full((x.shape[0], x.shape[1] + 1, *x.shape[2:]), float("nan"), dtype=x.dtype)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]
