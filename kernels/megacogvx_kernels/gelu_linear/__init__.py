"""The second linear layer of an MLP together with the GELU before it, of which only the input is kept."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from megacogvx_kernels.checks import require_floating, require_one_device, require_one_dtype, require_shape

__all__ = ["gelu_linear"]


def gelu_linear(x_SF: torch.Tensor, weight_DF: torch.Tensor) -> torch.Tensor:
    """Return gelu(x) W^T, GELU in its tanh form.

    Args:
        x_SF: `[S, F]` or `[S, 1, F]`.
        weight_DF: `[D, F]`, of the dtype of `x_SF`.

    Returns:
        `[S, D]` or `[S, 1, D]`.

    Backward: GELU is computed again, for the weight's gradient, whose memory then takes the gradient of `x_SF`. So
        nothing of the width F is kept but `x_SF`, and no more than one other tensor of that width lives at a time.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device; it is named.
    """
    require_floating("x_SF", x_SF)
    if x_SF.dim() not in (2, 3):
        raise ValueError(f"x_SF has the shape {tuple(x_SF.shape)}; expected [S, F] or [S, 1, F]")
    require_shape("weight_DF", weight_DF, (None, x_SF.shape[-1]))
    require_one_dtype(x_SF=x_SF, weight_DF=weight_DF)
    require_one_device(x_SF=x_SF, weight_DF=weight_DF)
    out: torch.Tensor = _GeluLinear.apply(x_SF, weight_DF)
    return out


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SF: torch.Tensor, weight_DF: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_SF, weight_DF)
        return F.gelu(x_SF, approximate="tanh") @ weight_DF.t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SD: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x_SF, weight_DF = ctx.saved_tensors
        grad, x = grad_SD.reshape(-1, weight_DF.shape[0]), x_SF.reshape(-1, weight_DF.shape[1])
        wants_x, wants_weight = ctx.needs_input_grad
        room_SF = F.gelu(x, approximate="tanh") if wants_weight else torch.empty_like(x)
        grad_weight_DF = grad.t() @ room_SF if wants_weight else None
        if not wants_x:
            return None, grad_weight_DF
        torch.mm(grad, weight_DF, out=room_SF)
        torch.ops.aten.gelu_backward.grad_input(room_SF, x, approximate="tanh", grad_input=room_SF)
        return room_SF.view(x_SF.shape), grad_weight_DF
