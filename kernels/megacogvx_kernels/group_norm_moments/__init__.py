"""Group normalisation of a clip: mean and variance over the channels of a group, all frames and all positions.

The statistics run over time, so all frames that are encoded or decoded together share them; this op is the only
place that computes them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megacogvx_kernels.checks import (
    require_count,
    require_floating,
    require_one_device,
    require_one_dtype,
    require_positive,
    require_shape,
)
from megacogvx_kernels.group_norm_moments import compiled, graphless, reference
from megacogvx_kernels.group_norm_moments.exchange import SharedGroupNorm

__all__ = ["group_norm_moments"]


def group_norm_moments(
    x_BCTHW: torch.Tensor,
    weight_C: torch.Tensor,
    bias_C: torch.Tensor,
    groups: int,
    eps: float,
    activation: bool = False,
    group: dist.ProcessGroup | None = None,
    overwrite: bool = False,
) -> torch.Tensor:
    """Normalise groups of channels over (C / groups, T, H, W), scale and shift, and optionally apply SiLU.

    Args:
        x_BCTHW: `[B, C, T, H, W]`, floating; moments are taken in fp32 or better.
        weight_C, bias_C: `[C]`.
        groups: groups of consecutive channels; divides C.
        eps: added to the variance, > 0: a constant clip gives `bias_C`, never NaN.
        activation: y * sigmoid(y) at the end.
        group: ranks that hold the clip, each some of its frames; T may differ between them. Every rank of the group
            makes this call, and takes part in its backward pass if any does. None: this process holds all frames.
        overwrite: nobody needs x any more; without a graph the result may take its place.

    Returns:
        `[B, C, T, H, W]`, dtype of x.
        Backward: the gradient through the moments of the whole clip; the ranks exchange two sums per sample and
        group. The gradients of `weight_C` and `bias_C` are those of this rank's frames, to be added over the ranks.

    Raises:
        TypeError: x, weight or bias is not floating, or `groups` no integer.
        ValueError: a shape, a device, `groups` or `eps` is none of the above.
    """
    require_floating("x_BCTHW", x_BCTHW)
    require_shape("x_BCTHW", x_BCTHW, (None,) * 5)
    if not x_BCTHW.numel():
        raise ValueError(f"x_BCTHW has the shape {tuple(x_BCTHW.shape)}; moments need at least one value")
    channels = x_BCTHW.shape[1]
    require_shape("weight_C", weight_C, (channels,))
    require_shape("bias_C", bias_C, (channels,))
    require_count("groups", groups)
    if groups < 1 or channels % groups:
        raise ValueError(f"groups={groups} must divide the {channels} channels of x_BCTHW")
    require_positive("eps", eps)
    require_one_dtype(weight_C=weight_C, bias_C=bias_C)
    require_one_device(x_BCTHW=x_BCTHW, weight_C=weight_C, bias_C=bias_C)
    shared = group if group is not None and group.size() > 1 else None
    if compiled.takes(x_BCTHW):
        return compiled.group_norm_moments(x_BCTHW, weight_C, bias_C, groups, eps, activation, shared)
    if not torch.is_grad_enabled():
        out = x_BCTHW if overwrite else torch.empty_like(x_BCTHW, memory_format=torch.contiguous_format)
        return graphless.group_norm_moments(x_BCTHW, weight_C, bias_C, groups, eps, activation, shared, out)
    if shared is not None:
        y_BCTHW: torch.Tensor = SharedGroupNorm.apply(x_BCTHW, weight_C, bias_C, groups, eps, shared)
        return F.silu(y_BCTHW) if activation else y_BCTHW
    return reference.group_norm_moments(x_BCTHW, weight_C, bias_C, groups, eps, activation)
