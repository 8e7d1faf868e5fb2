"""QK-norm and rotary position embedding in one step: qkv of a pack -> normed, rotated q and k.

Paper section 2.2 (3D-RoPE); the QK-norm and its order before the rotation are those of the published weights.
"""

from __future__ import annotations

from typing import Any

import torch

from megacogvx_kernels.checks import require_floating, require_integer, require_shape
from megacogvx_kernels.qk_norm_rope import reference

__all__ = ["qk_norm_rope", "take_v"]


def qk_norm_rope(
    qkv_SN3K: torch.Tensor,
    q_weight_K: torch.Tensor,
    q_bias_K: torch.Tensor,
    k_weight_K: torch.Tensor,
    k_bias_K: torch.Tensor,
    sample_table_M5: torch.Tensor,
    rope_grid_M6: torch.Tensor,
    token_offset: int,
    *,
    eps: float = 1e-6,
    axes: tuple[int, int, int] = (16, 24, 24),
    theta: float = 10000.0,
    rotate: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise q and k of every head, then rotate those of video tokens by their place in time, height and width.

    q' = R(position) (LayerNorm(q) * w_q + b_q), and k alike. R turns the pair of channels (2 i, 2 i + 1) of axis a, of
    width n_a, by position_a * theta^(-2 i / n_a). Text tokens and the padding are normed and not rotated. Everything
    is computed in fp32 and cast once at the end.

    Args:
        qkv_SN3K: `[S, N * 3 * K]` or `[S, 1, N * 3 * K]`, or already split `[S, N, 3, K]`: per head its q, k and v
            (megatron-core's layout). S are consecutive tokens of a pack.
        q_weight_K, q_bias_K, k_weight_K, k_bias_K: `[K]`, shared by all heads.
        sample_table_M5: int32 `[M, 5]`, per sample: first token in the pack, text tokens, grid t, h, w (in tokens).
        rope_grid_M6: fp32 `[M, 6]`: position of grid cell (i, j, k) is `[:3] + [3:] * (i, j, k)`.
        token_offset: place in the pack of the first token of `qkv_SN3K`.
        eps: of the LayerNorm over K.
        axes: channels of a head that stand for t, h and w; even numbers, their sum is K.
        theta: base of the frequencies.
        rotate: False leaves the rotation out (models with additive positions).

    Returns:
        q and k, `[S, N, K]` each, of the dtype of `qkv_SN3K`.

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape; it is named.
    """
    require_shape("q_weight_K", q_weight_K, (None,))
    width = q_weight_K.shape[0]
    for name, vector in (("q_bias_K", q_bias_K), ("k_weight_K", k_weight_K), ("k_bias_K", k_bias_K)):
        require_shape(name, vector, (width,))
    require_floating("qkv_SN3K", qkv_SN3K)
    if qkv_SN3K.numel() % (3 * width) or qkv_SN3K.dim() < 2:
        raise ValueError(f"qkv_SN3K has the shape {tuple(qkv_SN3K.shape)}; expected [S, N, 3, K] with K={width}")
    split_SN3K = qkv_SN3K.reshape(qkv_SN3K.shape[0], -1, 3, width)
    require_shape("sample_table_M5", sample_table_M5, (None, 5))
    require_integer("sample_table_M5", sample_table_M5)
    require_shape("rope_grid_M6", rope_grid_M6, (sample_table_M5.shape[0], 6))
    if rotate and (sum(axes) != width or any(axis % 2 for axis in axes)):
        raise ValueError(f"axes={tuple(axes)} must be three even numbers that sum to K={width}")
    if token_offset < 0:
        raise ValueError(f"token_offset={token_offset} must not be negative")
    return reference.qk_norm_rope(
        split_SN3K, q_weight_K, q_bias_K, k_weight_K, k_bias_K, sample_table_M5, rope_grid_M6, token_offset,
        eps=eps, axes=axes, theta=theta, rotate=rotate,
    )  # fmt: skip


def take_v(qkv_SN3K: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return qkv and its v, both without a copy.

    Args:
        qkv_SN3K: `[S, N, 3, K]`; what is returned of it is for `qk_norm_rope` alone.

    Returns:
        qkv `[S, N, 3, K]` and v `[S, N, K]`.

    Backward: the gradient of v is written into that of qkv, in which `qk_norm_rope` leaves its place empty. A slice
        would make another of the size of qkv, of zeros, and add the two.
    """
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
