"""Expert adaptive LayerNorm: norm, then shift and scale by a row of a table; and the gated residual around it.

Paper section 2.2 and figure 3. The table has one row per (sample, modality): row 2 m for the video tokens of sample m,
row 2 m + 1 for its text tokens, so nothing of the size of the sequence is stored for it.
"""

from __future__ import annotations

import torch

from megacogvx_kernels.adaln import compiled, reference
from megacogvx_kernels.adaln.runs import runs_of
from megacogvx_kernels.checks import (
    require_floating,
    require_integer,
    require_one_device,
    require_one_dtype,
    require_positive,
    require_shape,
    require_vectors,
)

__all__ = ["adaln_modulate", "gated_residual", "gated_residual_adaln"]


def adaln_modulate(
    x_SD: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    modulation_R3D: torch.Tensor,
    rows_S: torch.Tensor,
    *,
    eps: float,
) -> torch.Tensor:
    """Return LN(x) * (1 + scale[rows]) + shift[rows], computed in fp32 and cast once.

    Args:
        x_SD: `[S, D]` or `[S, 1, D]`, S at least 1.
        weight_D, bias_D: affine parameters of the LayerNorm over D.
        modulation_R3D: `[R, 3, D]`: shift, scale, gate (only the first two are read, so `[R, 2, D]` will do).
        rows_S: int64 `[S]`, the table row of each token.
        eps: of the LayerNorm.

    Returns:
        shape and dtype of `x_SD`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or layout, or a row isn't in the table; it
            is named.
    """
    _check_tokens(rows_S, x_SD=x_SD)
    _check_affine(x_SD, weight_D, bias_D, eps)
    _check_table("modulation_R3D", modulation_R3D, 2, x_SD, rows_S)
    parameters = (weight_D, bias_D, modulation_R3D)
    implementation = compiled if compiled.takes("adaln_modulate", (x_SD,), parameters) else reference
    return implementation.adaln_modulate(x_SD, *parameters, rows_S, eps=eps)


def gated_residual(
    residual_SD: torch.Tensor, branch_SD: torch.Tensor, modulation_R3D: torch.Tensor, rows_S: torch.Tensor
) -> torch.Tensor:
    """Return residual + gate[rows] * branch, computed in fp32 and cast once.

    Args:
        residual_SD, branch_SD: `[S, D]` or `[S, 1, D]`, S at least 1.
        modulation_R3D: `[R, 3, D]`: shift, scale, gate (the gate is read).
        rows_S: int64 `[S]`, the table row of each token.

    Returns:
        shape and dtype of `residual_SD`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or layout, or a row isn't in the table; it
            is named.
    """
    _check_tokens(rows_S, residual_SD=residual_SD, branch_SD=branch_SD)
    _check_table("modulation_R3D", modulation_R3D, 3, residual_SD, rows_S)
    is_compiled = compiled.takes("gated_residual", (residual_SD, branch_SD), (modulation_R3D,))
    implementation = compiled if is_compiled else reference
    return implementation.gated_residual(residual_SD, branch_SD, modulation_R3D, rows_S)


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
    """Close one branch and open the next: `gated_residual`, then `adaln_modulate` of the new residual.

    Args:
        residual_SD, branch_SD: `[S, D]` or `[S, 1, D]`, S at least 1.
        gate_modulation_R3D: `[R, 3, D]`, the table of the branch that ends here (its gate is read).
        weight_D, bias_D: affine parameters of the LayerNorm over D.
        modulation_R3D: `[R, 3, D]`, the table of the branch that begins (shift and scale are read).
        rows_S: int64 `[S]`, the table row of each token.
        eps: of the LayerNorm.

    Returns:
        (new residual, modulated), both of the shape and dtype of `residual_SD`. The modulated tokens come from the
        residual as it is stored, after the cast.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or layout, or a row isn't in the table; it
            is named.
    """
    _check_tokens(rows_S, residual_SD=residual_SD, branch_SD=branch_SD)
    _check_table("gate_modulation_R3D", gate_modulation_R3D, 3, residual_SD, rows_S)
    _check_affine(residual_SD, weight_D, bias_D, eps)
    _check_table("modulation_R3D", modulation_R3D, 2, residual_SD, rows_S)
    if modulation_R3D.shape[0] != gate_modulation_R3D.shape[0]:
        rows = (modulation_R3D.shape[0], gate_modulation_R3D.shape[0])
        raise ValueError(f"modulation_R3D has {rows[0]} rows, gate_modulation_R3D {rows[1]}; they must agree")
    parameters = (weight_D, bias_D, modulation_R3D)
    tokens = (residual_SD, branch_SD)
    is_compiled = compiled.takes("gated_residual_adaln", tokens, (gate_modulation_R3D, *parameters))
    implementation = compiled if is_compiled else reference
    return implementation.gated_residual_adaln(*tokens, gate_modulation_R3D, *parameters, rows_S, eps=eps)


def _check_tokens(rows_S: torch.Tensor, **tokens: torch.Tensor) -> None:
    (name, first_SD), *others = tokens.items()
    require_floating(name, first_SD)
    shape = tuple(first_SD.shape)
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[1] != 1) or not first_SD.numel():
        raise ValueError(f"{name} has the shape {shape}; expected [S, D] or [S, 1, D], S and D at least 1")
    require_shape("rows_S", rows_S, shape[:1])
    require_integer("rows_S", rows_S)
    for other, x_SD in others:
        require_shape(other, x_SD, shape)
        require_floating(other, x_SD)
    for each, x_SD in tokens.items():
        require_vectors(each, x_SD)
    require_one_device(**tokens, rows_S=rows_S)


def _check_affine(x_SD: torch.Tensor, weight_D: torch.Tensor, bias_D: torch.Tensor, eps: float) -> None:
    require_shape("weight_D", weight_D, (x_SD.shape[-1],))
    require_shape("bias_D", bias_D, (x_SD.shape[-1],))
    require_one_dtype(weight_D=weight_D, bias_D=bias_D)
    require_one_device(x_SD=x_SD, weight_D=weight_D, bias_D=bias_D)
    require_positive("eps", eps)


def _check_table(name: str, table: torch.Tensor, least: int, x_SD: torch.Tensor, rows_S: torch.Tensor) -> None:
    require_shape(name, table, (None, None, x_SD.shape[-1]))
    require_floating(name, table)
    if table.shape[1] < least:
        raise ValueError(f"{name} has the shape {tuple(table.shape)}; it needs {least} vectors a row")
    require_one_device(x_SD=x_SD, **{name: table})
    if not (rows_S.is_meta or torch.compiler.is_compiling()):
        runs_of(rows_S, table.shape[0])  # raises for a row that the table doesn't have
