"""`group_norm_moments` without a graph: some channels at a time, so that little is held beside x and the result.

A few channels also stay in a processor's cache between the passes over them. The result may take the place of x.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megacogvx_kernels.group_norm_moments.exchange import merge_moments

PIECE_BYTES = 2**22  # of the channels that are normalised at a time


def group_norm_moments(
    x_BCTHW: torch.Tensor,
    weight_C: torch.Tensor,
    bias_C: torch.Tensor,
    groups: int,
    eps: float,
    activation: bool,
    group: dist.ProcessGroup | None,
    out_BCTHW: torch.Tensor,
) -> torch.Tensor:
    """Write the result into `out_BCTHW`, which may be x itself, and return that."""
    merged_2BG = None if group is None else _merged(x_BCTHW, groups, eps, group)
    width = x_BCTHW.shape[1] // groups
    step = max(1, PIECE_BYTES // (width * x_BCTHW[0, 0].nbytes))
    for sample in range(x_BCTHW.shape[0]):
        for first in range(0, groups, step):
            last = min(first + step, groups)
            place = (slice(sample, sample + 1), slice(first * width, last * width))
            weight, bias = weight_C[place[1]], bias_C[place[1]]
            if merged_2BG is None:
                y = F.group_norm(x_BCTHW[place], last - first, weight, bias, eps)
            else:
                y = _affine(x_BCTHW[place], merged_2BG[:, sample, first:last], weight, bias)
            out_BCTHW[place] = F.silu(y, inplace=True) if activation else y
            del y  # else it would live on beside the next one
    return out_BCTHW


def _merged(x_BCTHW: torch.Tensor, groups: int, eps: float, group: dist.ProcessGroup) -> torch.Tensor:
    """Return mean and reciprocal deviation of the whole clip, `[2, B, G]`, fp32 or better."""
    precision = torch.promote_types(x_BCTHW.dtype, torch.float32)
    means, deviations = [], []
    for part in x_BCTHW.unflatten(1, (groups, -1)).unbind(1):
        variance_B, mean_B = torch.var_mean(part.flatten(1).to(precision), dim=1, correction=0)
        means.append(mean_B)
        deviations.append(variance_B * part[0].numel())
    mean_BG, deviations_BG = torch.stack(means, dim=1), torch.stack(deviations, dim=1)
    frames = x_BCTHW.shape[2]
    values = x_BCTHW[0].numel() // groups // frames
    mean_BG, variance_BG, _ = merge_moments(mean_BG, deviations_BG, frames, values, group)
    return torch.stack([mean_BG, (variance_BG + eps).rsqrt()]).to(precision)


def _affine(x: torch.Tensor, merged_2G: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    mean, rstd = merged_2G.repeat_interleave(x.shape[1] // merged_2G.shape[1], dim=1)[:, :, None, None, None]
    weight, bias = (each.to(mean.dtype)[:, None, None, None] for each in (weight, bias))
    y = (x.to(mean.dtype) - mean).mul_(rstd).mul_(weight).add_(bias)
    return y.to(x.dtype)
