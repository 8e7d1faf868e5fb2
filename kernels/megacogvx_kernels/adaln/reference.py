"""The plain definition of the expert adaptive LayerNorm ops, differentiable through autograd.

Equations of figure 3 of the paper, for a token x of (sample, modality) r:
    modulated = LN(x) * (1 + scale_r) + shift_r        residual' = residual + gate_r * branch
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

SHIFT, SCALE, GATE = 0, 1, 2  # columns of the table


def adaln_modulate(
    x_SD: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    modulation_R3D: torch.Tensor,
    rows_S: torch.Tensor,
    *,
    eps: float,
) -> torch.Tensor:
    """Return LN(x) * (1 + scale[rows]) + shift[rows]; see the public function for the arguments."""
    precision = torch.promote_types(x_SD.dtype, torch.float32)
    normed = F.layer_norm(x_SD.to(precision), weight_D.shape, weight_D.to(precision), bias_D.to(precision), eps)
    scale = _spread(modulation_R3D, SCALE, rows_S, x_SD)
    shift = _spread(modulation_R3D, SHIFT, rows_S, x_SD)
    return (normed * (1 + scale) + shift).to(x_SD.dtype)


def gated_residual(
    residual_SD: torch.Tensor, branch_SD: torch.Tensor, modulation_R3D: torch.Tensor, rows_S: torch.Tensor
) -> torch.Tensor:
    """Add gate[rows] * branch to the residual; see the public function for the arguments."""
    gate = _spread(modulation_R3D, GATE, rows_S, residual_SD)
    return (residual_SD.to(gate.dtype) + gate * branch_SD.to(gate.dtype)).to(residual_SD.dtype)


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
    """`gated_residual`, then `adaln_modulate` of what comes out."""
    residual_SD = gated_residual(residual_SD, branch_SD, gate_modulation_R3D, rows_S)
    return residual_SD, adaln_modulate(residual_SD, weight_D, bias_D, modulation_R3D, rows_S, eps=eps)


def _spread(table_R3D: torch.Tensor, column: int, rows_S: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return one column of the table for every token, fp32 or better, in the shape of `like`.

    Backward: the gradients of a row's tokens are summed in fp32, also where the table is bf16.
    """
    precision = torch.promote_types(like.dtype, torch.float32)
    return table_R3D[:, column].to(precision).index_select(0, rows_S).reshape(like.shape)
