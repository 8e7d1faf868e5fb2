"""One gradient for qkv, although `qk_norm_rope` reads its q and k and attention its v."""

from __future__ import annotations

from typing import Any

import torch

from megacogvx_kernels.checks import require_floating, require_shape


def take_v(qkv_SN3K: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return qkv and its v, both without a copy.

    Args:
        qkv_SN3K: `[S, N, 3, K]`, at least one token; what is returned of it is for `qk_norm_rope` alone.

    Returns:
        qkv `[S, N, 3, K]` and v `[S, N, K]`.

    Backward: the gradient of v is written into that of qkv, in which `qk_norm_rope` leaves its place empty. A slice
        would make another of the size of qkv, of zeros, and add the two.

    Raises:
        TypeError, ValueError: the argument has the wrong type or shape, or holds nothing; it is named.
    """
    require_floating("qkv_SN3K", qkv_SN3K)
    require_shape("qkv_SN3K", qkv_SN3K, (None, None, 3, None))
    if not qkv_SN3K.numel():
        raise ValueError(f"qkv_SN3K has the shape {tuple(qkv_SN3K.shape)}; S, N and K must be at least 1")
    qkv, v = _TakeV.apply(qkv_SN3K)
    return qkv, v


class _TakeV(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_SN3K: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return qkv_SN3K.view_as(qkv_SN3K), qkv_SN3K[:, :, 2]

    @staticmethod
    def backward(ctx: Any, dqkv_SN3K: torch.Tensor, dv_SNK: torch.Tensor) -> torch.Tensor:
        dqkv_SN3K[:, :, 2] = dv_SNK
        return dqkv_SN3K
