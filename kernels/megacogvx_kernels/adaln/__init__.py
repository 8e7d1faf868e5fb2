"""Expert adaptive LayerNorm: norm, then shift and scale by a row of a table; and the gated residual around it.

Paper section 2.2 and figure 3. The table has one row per (sample, modality): row 2 m for the video tokens of sample m,
row 2 m + 1 for its text tokens, so nothing of the size of the sequence is stored for it.
"""

from __future__ import annotations

from types import ModuleType

import torch

from megacogvx_kernels.adaln import chunked, reference
from megacogvx_kernels.checks import require_floating, require_integer, require_shape

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
        x_SD: `[S, D]` or `[S, 1, D]`.
        weight_D, bias_D: affine parameters of the LayerNorm over D.
        modulation_R3D: `[R, 3, D]`: shift, scale, gate (only the first two are read, so `[R, 2, D]` will do).
        rows_S: int64 `[S]`, the table row of each token.
        eps: of the LayerNorm.

    Returns:
        shape and dtype of `x_SD`.

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape; it is named.
    """
    _check_tokens("x_SD", x_SD, rows_S)
    _check_affine(weight_D, bias_D, x_SD.shape[-1])
    _check_table("modulation_R3D", modulation_R3D, 2, x_SD.shape[-1])
    return _of(x_SD).adaln_modulate(x_SD, weight_D, bias_D, modulation_R3D, rows_S, eps=eps)


def gated_residual(
    residual_SD: torch.Tensor, branch_SD: torch.Tensor, modulation_R3D: torch.Tensor, rows_S: torch.Tensor
) -> torch.Tensor:
    """Return residual + gate[rows] * branch, computed in fp32 and cast once.

    Args:
        residual_SD, branch_SD: `[S, D]` or `[S, 1, D]`.
        modulation_R3D: `[R, 3, D]`: shift, scale, gate (the gate is read).
        rows_S: int64 `[S]`, the table row of each token.

    Returns:
        shape and dtype of `residual_SD`.

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape; it is named.
    """
    _check_tokens("residual_SD", residual_SD, rows_S)
    require_shape("branch_SD", branch_SD, tuple(residual_SD.shape))
    _check_table("modulation_R3D", modulation_R3D, 3, residual_SD.shape[-1])
    return _of(residual_SD).gated_residual(residual_SD, branch_SD, modulation_R3D, rows_S)


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
        residual_SD, branch_SD: `[S, D]` or `[S, 1, D]`.
        gate_modulation_R3D: `[R, 3, D]`, the table of the branch that ends here (its gate is read).
        weight_D, bias_D: affine parameters of the LayerNorm over D.
        modulation_R3D: `[R, 3, D]`, the table of the branch that begins (shift and scale are read).
        rows_S: int64 `[S]`, the table row of each token.
        eps: of the LayerNorm.

    Returns:
        (new residual, modulated), both of the shape and dtype of `residual_SD`. The modulated tokens come from the
        residual as it is stored, after the cast.

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape; it is named.
    """
    width = residual_SD.shape[-1]
    _check_tokens("residual_SD", residual_SD, rows_S)
    require_shape("branch_SD", branch_SD, tuple(residual_SD.shape))
    _check_table("gate_modulation_R3D", gate_modulation_R3D, 3, width)
    _check_affine(weight_D, bias_D, width)
    _check_table("modulation_R3D", modulation_R3D, 2, width)
    return _of(residual_SD).gated_residual_adaln(
        residual_SD, branch_SD, gate_modulation_R3D, weight_D, bias_D, modulation_R3D, rows_S, eps=eps
    )


def _of(tokens: torch.Tensor) -> ModuleType:
    """Return the module that computes this: on a CPU in chunks, elsewhere the plain definition."""
    return chunked if tokens.device.type == "cpu" and tokens.dtype != torch.float64 else reference


def _check_tokens(name: str, x_SD: torch.Tensor, rows_S: torch.Tensor) -> None:
    require_floating(name, x_SD)
    if x_SD.dim() not in (2, 3) or (x_SD.dim() == 3 and x_SD.shape[1] != 1):
        raise ValueError(f"{name} has the shape {tuple(x_SD.shape)}; expected [S, D] or [S, 1, D]")
    require_shape("rows_S", rows_S, (x_SD.shape[0],))
    require_integer("rows_S", rows_S)


def _check_affine(weight_D: torch.Tensor, bias_D: torch.Tensor, width: int) -> None:
    require_shape("weight_D", weight_D, (width,))
    require_shape("bias_D", bias_D, (width,))


def _check_table(name: str, table: torch.Tensor, least: int, width: int) -> None:
    require_shape(name, table, (None, None, width))
    if table.shape[1] < least:
        raise ValueError(f"{name} has the shape {tuple(table.shape)}; it needs {least} vectors a row")
