"""The adaLN ops on a CPU: some tokens at a time, and a backward pass that makes the norm again instead of keeping it.

Between forward and backward autograd would keep the normed tokens, the scale and the gate of every token of the
reference: three tensors of the size of the sequence a norm, where these functions keep the mean and the deviation of a
token. Temporaries are of one chunk, which stays in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megacogvx_kernels.adaln.reference import GATE, SCALE, SHIFT

CHUNK = 512  # tokens


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
    result: torch.Tensor = _AdaLN.apply(x_SD, weight_D, bias_D, modulation_R3D, rows_S, eps)
    return result


def gated_residual(
    residual_SD: torch.Tensor, branch_SD: torch.Tensor, modulation_R3D: torch.Tensor, rows_S: torch.Tensor
) -> torch.Tensor:
    """Add gate[rows] * branch to the residual; see the public function for the arguments."""
    result: torch.Tensor = _Gate.apply(residual_SD, branch_SD, modulation_R3D, rows_S)
    return result


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


class _AdaLN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, table: torch.Tensor, rows: torch.Tensor,
        eps: float,
    ) -> torch.Tensor:  # fmt: skip
        x_SD, affine = x.reshape(len(rows), -1), (weight.float(), bias.float())
        shift_RD, factor_RD = table[:, SHIFT].float(), 1 + table[:, SCALE].float()
        out_SD = torch.empty_like(x_SD)
        mean_S1, inverse_deviation_S1 = (torch.empty(len(rows), 1, dtype=torch.float32) for _ in range(2))
        for chunk in _chunks(rows):
            normed, mean_S1[chunk], inverse_deviation_S1[chunk] = torch.native_layer_norm(
                x_SD[chunk].float(), weight.shape, *affine, eps
            )
            out_SD[chunk] = normed.mul_(factor_RD[rows[chunk]]).add_(shift_RD[rows[chunk]])
        ctx.save_for_backward(x, weight, bias, table, rows, mean_S1, inverse_deviation_S1)
        return out_SD.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias, table, rows, mean_S1, inverse_deviation_S1 = ctx.saved_tensors
        x_SD, gradient_SD = x.reshape(len(rows), -1), gradient.reshape(len(rows), -1)
        affine, factor_RD = (weight.float(), bias.float()), 1 + table[:, SCALE].float()
        dx_SD, dtable = torch.empty_like(x_SD), torch.zeros(table.shape, dtype=torch.float32)
        dweight, dbias = torch.zeros_like(affine[0]), torch.zeros_like(affine[1])
        for chunk in _chunks(rows):
            part, tokens, statistics = rows[chunk], x_SD[chunk].float(), (mean_S1[chunk], inverse_deviation_S1[chunk])
            dout = gradient_SD[chunk].float()
            normed = (tokens - statistics[0]).mul_(statistics[1]).mul_(affine[0]).add_(affine[1])
            dtable[:, SHIFT].index_add_(0, part, dout)
            dtable[:, SCALE].index_add_(0, part, normed.mul_(dout))
            dx_SD[chunk], more_weight, more_bias = torch.ops.aten.native_layer_norm_backward(
                dout * factor_RD[part], tokens, weight.shape, *statistics, *affine, [True, True, True]
            )
            dweight += more_weight
            dbias += more_bias
        return dx_SD.view_as(x), dweight.to(weight.dtype), dbias.to(bias.dtype), dtable.to(table.dtype), None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, residual: torch.Tensor, branch: torch.Tensor, table: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        residual_SD, branch_SD = residual.reshape(len(rows), -1), branch.reshape(len(rows), -1)
        out_SD, gate_RD = torch.empty_like(residual_SD), table[:, GATE].float()
        for chunk in _chunks(rows):
            gated = gate_RD[rows[chunk]].mul_(branch_SD[chunk])
            out_SD[chunk] = gated.add_(residual_SD[chunk])
        ctx.save_for_backward(branch, table, rows)
        ctx.residual_dtype = residual.dtype
        return out_SD.view_as(residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        branch, table, rows = ctx.saved_tensors
        branch_SD, gradient_SD = branch.reshape(len(rows), -1), gradient.reshape(len(rows), -1)
        dbranch_SD, gate_RD = torch.empty_like(branch_SD), table[:, GATE].float()
        dtable = torch.zeros(table.shape, dtype=torch.float32)
        for chunk in _chunks(rows):
            part, dout = rows[chunk], gradient_SD[chunk].float()
            dtable[:, GATE].index_add_(0, part, dout * branch_SD[chunk])
            dbranch_SD[chunk] = gate_RD[part].mul_(dout)
        return gradient.to(ctx.residual_dtype), dbranch_SD.view_as(branch), dtable.to(table.dtype), None


def _chunks(rows: torch.Tensor) -> Iterator[slice]:
    for start in range(0, len(rows), CHUNK):
        yield slice(start, start + CHUNK)
