"""The second linear layer of an MLP together with the GELU before it, of which only the input is kept."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from megacogvx_kernels.checks import require_floating, require_one_device, require_one_dtype, require_shape

__all__ = ["gelu_linear"]


def gelu_linear(x_SF: torch.Tensor, weight_DF: torch.Tensor, *, keep_gelu: bool = False) -> torch.Tensor:
    """Return gelu(x) W^T, GELU in its tanh form.

    Args:
        x_SF: `[S, F]` or `[S, 1, F]`, S at least 1.
        weight_DF: `[D, F]`, of the dtype of `x_SF`.
        keep_gelu: keep GELU's output as well; for a forward pass that its backward follows at once (a recompute), where
            both would live at that time anyway. There is one backward pass then.

    Returns:
        `[S, D]` or `[S, 1, D]`.

    Backward: GELU is computed again, or taken as kept, for the weight's gradient; its memory then takes the gradient of
        `x_SF`. So no more than one other tensor of the width F lives at a time, and by default none is kept.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device; it is named.
    """
    require_floating("x_SF", x_SF)
    if x_SF.dim() not in (2, 3) or not x_SF.numel():
        raise ValueError(f"x_SF has the shape {tuple(x_SF.shape)}; expected [S, F] or [S, 1, F], S and F at least 1")
    require_shape("weight_DF", weight_DF, (None, x_SF.shape[-1]))
    require_one_dtype(x_SF=x_SF, weight_DF=weight_DF)
    require_one_device(x_SF=x_SF, weight_DF=weight_DF)
    out: torch.Tensor = _GeluLinear.apply(x_SF, weight_DF, keep_gelu)
    return out


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SF: torch.Tensor, weight_DF: torch.Tensor, keep_gelu: bool) -> torch.Tensor:
        gelu_SF = F.gelu(x_SF, approximate="tanh")
        ctx.save_for_backward(x_SF, weight_DF, *([gelu_SF] if keep_gelu else []))
        return gelu_SF @ weight_DF.t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SD: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x_SF, weight_DF, *kept = ctx.saved_tensors
        grad, x = grad_SD.reshape(-1, weight_DF.shape[0]), x_SF.reshape(-1, weight_DF.shape[1])
        wants_x, wants_weight, _ = ctx.needs_input_grad
        if kept:
            room_SF = kept[0].view(x.shape)
        else:
            room_SF = F.gelu(x, approximate="tanh") if wants_weight else torch.empty_like(x)
        grad_weight_DF = grad.t() @ room_SF if wants_weight else None
        if not wants_x:
            return None, grad_weight_DF, None
        torch.mm(grad, weight_DF, out=room_SF)
        torch.ops.aten.gelu_backward.grad_input(room_SF, x, approximate="tanh", grad_input=room_SF)
        return room_SF.view(x_SF.shape), grad_weight_DF, None
