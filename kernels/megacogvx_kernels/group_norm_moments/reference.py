"""The plain definition of `group_norm_moments`: one process holds all frames."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def group_norm_moments(
    x_BCTHW: torch.Tensor,
    weight_C: torch.Tensor,
    bias_C: torch.Tensor,
    groups: int,
    eps: float,
    activation: bool = False,
) -> torch.Tensor:
    """Return `(x - mean) / sqrt(variance + eps) * weight + bias`, moments per sample and group, SiLU if asked."""
    y_BCTHW = F.group_norm(x_BCTHW, groups, weight_C, bias_C, eps)
    return F.silu(y_BCTHW) if activation else y_BCTHW
