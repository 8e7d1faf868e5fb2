"""The ops of `adaln` as registered ops, `megacogvx::adaln_modulate` and so on, each with its gradient as another op.

They are defined and implemented in csrc/ for CPU and CUDA. Here are their shapes for tracing and the autograd formulas.
Forward takes what only backward needs, the runs of tokens of one row, so that autograd keeps them beside the inputs.
Results are never views: a pipeline stage frees its output's memory once it is sent, and can't free a view's.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from megacogvx_kernels import compiled
from megacogvx_kernels.adaln.runs import runs_of
from megacogvx_kernels.checks import packed

WIDEST, CHUNK = 4096, 8  # channels of a token that the kernels take, in eights


def takes(op: str, tokens: tuple[torch.Tensor, ...], parameters: tuple[torch.Tensor, ...]) -> bool:
    """Tell whether the compiled op answers this call; see `compiled.answers`."""
    x_SD, width = tokens[0], tokens[0].shape[-1]
    is_uniform = all(x.dtype == x_SD.dtype for x in tokens)
    fits_kernel = width % CHUNK == 0 and width <= WIDEST
    fits_kernel = fits_kernel and all(x.dtype != torch.float64 for x in (x_SD, *parameters))
    if not is_uniform or not compiled.answers(op, x_SD, fits_kernel):
        return False
    _register()
    return True


def adaln_modulate(
    x_SD: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    modulation_R3D: torch.Tensor,
    rows_S: torch.Tensor,
    *,
    eps: float,
) -> torch.Tensor:
    """Call the registered op; the arguments are the reference's."""
    found: torch.Tensor = torch.ops.megacogvx.adaln_modulate(
        packed(x_SD), packed(weight_D), packed(bias_D), packed(modulation_R3D),
        *_rows(rows_S, modulation_R3D), eps,
    )  # fmt: skip
    return found


def gated_residual(
    residual_SD: torch.Tensor, branch_SD: torch.Tensor, modulation_R3D: torch.Tensor, rows_S: torch.Tensor
) -> torch.Tensor:
    """Call the registered op; the arguments are the reference's."""
    found: torch.Tensor = torch.ops.megacogvx.gated_residual(
        packed(residual_SD), packed(branch_SD), packed(modulation_R3D), *_rows(rows_S, modulation_R3D)
    )
    return found


def gated_residual_adaln(
    residual_SD: torch.Tensor,
    branch_SD: torch.Tensor,
    gate_modulation_R3D: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    modulation_R3D: torch.Tensor,
    rows_S: torch.Tensor,
    *,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call the registered op; the arguments are the reference's."""
    found: tuple[torch.Tensor, torch.Tensor] = torch.ops.megacogvx.gated_residual_adaln(
        packed(residual_SD), packed(branch_SD), packed(gate_modulation_R3D), packed(weight_D),
        packed(bias_D), packed(modulation_R3D), *_rows(rows_S, modulation_R3D), eps,
    )  # fmt: skip
    return found


def _rows(rows_S: torch.Tensor, table_R3D: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return rows_S.long().contiguous(), *runs_of(rows_S, table_R3D.shape[0])


@cache
def _register() -> None:
    library = torch.library
    library.register_fake("megacogvx::adaln_modulate")(lambda x, *rest: torch.empty_like(x))
    library.register_fake("megacogvx::gated_residual")(lambda x, *rest: torch.empty_like(x))
    library.register_fake("megacogvx::gated_residual_adaln")(lambda x, *rest: _like(x, x))
    library.register_fake("megacogvx::adaln_modulate_backward")(lambda gradient, *inputs: _like(*inputs[:4]))
    library.register_fake("megacogvx::gated_residual_backward")(lambda gradient, *inputs: _like(*inputs[:2]))
    library.register_fake("megacogvx::gated_residual_adaln_backward")(lambda a, b, *inputs: _like(*inputs[:6]))
    library.register_autograd("megacogvx::adaln_modulate", _modulate_backward, setup_context=_keep)
    library.register_autograd("megacogvx::gated_residual", _residual_backward, setup_context=_keep_branch)
    library.register_autograd("megacogvx::gated_residual_adaln", _both_backward, setup_context=_keep_residual)


def _like(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty_like(x) for x in tensors)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.eps = [x for x in inputs if not isinstance(x, torch.Tensor)]
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, torch.Tensor)))


def _keep_branch(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _keep(ctx, inputs[1:], output)


def _keep_residual(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    """The new residual is kept by whoever comes next anyway; the one before isn't needed."""
    _keep(ctx, (output[0], *inputs[1:]), output)


def _modulate_backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    """Return the gradients of x, weight, bias and table; statistics are computed again."""
    found = torch.ops.megacogvx.adaln_modulate_backward(packed(gradient), *ctx.saved_tensors, *ctx.eps)
    return (*found, *(None,) * 4)


def _residual_backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    """Return the gradients of residual (what came), branch and table."""
    found = torch.ops.megacogvx.gated_residual_backward(packed(gradient), *ctx.saved_tensors)
    return (gradient, *found, *(None,) * 3)


def _both_backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
    """Return the gradients of residual, branch, its table, weight, bias and the second table."""
    of_residual, of_modulated = (packed(gradient) for gradient in gradients)
    found = torch.ops.megacogvx.gated_residual_adaln_backward(of_residual, of_modulated, *ctx.saved_tensors, *ctx.eps)
    return (*found, *(None,) * 4)
