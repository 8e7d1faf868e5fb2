"""`group_norm_moments` for a clip whose frames lie on several ranks: two numbers per sample and group are exchanged.

Forward they are the mean and the sum of squared deviations from it, merged pairwise-exactly (Chan, Golub and LeVeque
1979, equations 2.1); a sum and a sum of squares would cancel where the mean is large. Backward they are the two sums
in the gradient of a normalisation. Activations stay where they are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable


def merge_moments(
    mean_BG: torch.Tensor, deviations_BG: torch.Tensor, frames: int, values_per_frame: int, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merge the moments of all ranks.

        N = sum_r n_r,  mean = sum_r n_r mean_r / N,  M2 = sum_r (M2_r + n_r (mean_r - mean)^2)

    Args:
        mean_BG: mean of this rank's values, per sample and group.
        deviations_BG: M2_r, their summed squared deviations from it.
        frames: of this rank; n_r = frames * values_per_frame.
        values_per_frame: values of a group in one frame, the same on all ranks.
        group: the ranks.

    Returns:
        mean `[B, G]`, variance M2 / N `[B, G]` and N (no dimensions), fp64, the same on all ranks.
    """
    mine = torch.cat([mean_BG.flatten(), deviations_BG.flatten(), mean_BG.new_full((1,), frames)])
    every = mine.new_empty(group.size() * len(mine))
    dist.all_gather_into_tensor(every, mine, group=group)
    every_RX = every.view(group.size(), -1).double()
    count_R1 = every_RX[:, -1:] * values_per_frame
    mean_RX, deviations_RX = every_RX[:, :-1].chunk(2, dim=1)
    count = count_R1.sum()
    mean_X = (count_R1 * mean_RX).sum(dim=0) / count
    variance_X = (deviations_RX + count_R1 * (mean_RX - mean_X).square()).sum(dim=0) / count
    return mean_X.view_as(mean_BG), variance_X.view_as(mean_BG), count


class SharedGroupNorm(torch.autograd.Function):
    """Group normalisation with the moments of all ranks of a process group; the equation is the reference's."""

    @staticmethod
    def forward(
        ctx: Any, x_BCTHW: torch.Tensor, weight_C: torch.Tensor, bias_C: torch.Tensor,
        groups: int, eps: float, group: dist.ProcessGroup,
    ) -> torch.Tensor:  # fmt: skip
        """Return the normalised frames of this rank, dtype of x."""
        precision = torch.promote_types(x_BCTHW.dtype, torch.float32)
        x_BGN = x_BCTHW.reshape(len(x_BCTHW), groups, -1).to(precision)
        variance_BG, mean_BG = torch.var_mean(x_BGN, dim=2, correction=0)
        values, frames = x_BGN.shape[2], x_BCTHW.shape[2]
        mean_BG, variance_BG, count = merge_moments(mean_BG, variance_BG * values, frames, values // frames, group)
        mean_BG1 = mean_BG.to(precision).unsqueeze(2)
        rstd_BG1 = (variance_BG + eps).rsqrt().to(precision).unsqueeze(2)
        normal_BCX = ((x_BGN - mean_BG1) * rstd_BG1).view(*x_BCTHW.shape[:2], -1)
        y_BCX = torch.addcmul(bias_C.to(precision)[:, None], normal_BCX, weight_C.to(precision)[:, None])
        ctx.save_for_backward(x_BCTHW, weight_C, mean_BG1, rstd_BG1, count)
        ctx.group, ctx.bias_dtype = group, bias_C.dtype
        return y_BCX.view(x_BCTHW.shape).to(x_BCTHW.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of this rank's frames, and its share of those of weight and bias.

        With g = dy * weight and n = (x - mean) * rstd:  dx = rstd * (g - sum(g) / N - n * sum(g n) / N).
        """
        x_BCTHW, weight_C, mean_BG1, rstd_BG1, count = ctx.saved_tensors
        (batch, channels), groups = x_BCTHW.shape[:2], mean_BG1.shape[1]
        x_BGN = x_BCTHW.reshape(batch, groups, -1).to(mean_BG1.dtype)
        normal_BCX = ((x_BGN - mean_BG1) * rstd_BG1).view(batch, channels, -1)
        dy_BCX = gradients[0].reshape(batch, channels, -1).to(mean_BG1.dtype)
        sums_2BC = torch.stack([dy_BCX.sum(dim=2), (dy_BCX * normal_BCX).sum(dim=2)])
        bias_gradient, weight_gradient = sums_2BC.sum(dim=1).unbind()
        x_gradient = None
        if ctx.needs_input_grad[0]:
            weight = weight_C.to(mean_BG1.dtype)
            sums_2BG = (sums_2BC * weight).view(2, batch, groups, -1).sum(dim=3)
            dist.all_reduce(sums_2BG, group=ctx.group)
            means_2BG1 = (sums_2BG.double() / count).to(mean_BG1.dtype).unsqueeze(3)
            g_BGN = (dy_BCX * weight[:, None]).view(batch, groups, -1)
            g_BGN = g_BGN - means_2BG1[0] - normal_BCX.view(batch, groups, -1) * means_2BG1[1]
            x_gradient = (g_BGN * rstd_BG1).view(x_BCTHW.shape).to(x_BCTHW.dtype)
        return x_gradient, weight_gradient.to(weight_C.dtype), bias_gradient.to(ctx.bias_dtype), None, None, None
