"""The plain definition of `causal_halo`: one process holds all frames."""

from __future__ import annotations

import torch


def causal_halo(x_BCTHW: torch.Tensor, size: int, previous_BCTHW: torch.Tensor | None = None) -> torch.Tensor:
    """Return `[previous, x]` along T, or `[x[0], ... x[0], x]` without previous frames."""
    if size == 0:
        return x_BCTHW
    if previous_BCTHW is None:
        previous_BCTHW = x_BCTHW[:, :, :1].expand(-1, -1, size, -1, -1)
    return torch.cat([previous_BCTHW, x_BCTHW], dim=2)
