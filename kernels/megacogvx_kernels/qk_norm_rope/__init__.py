"""QK-norm and rotary position embedding in one step: qkv of a pack -> normed, rotated q and k.

Paper section 2.2 (3D-RoPE); the QK-norm and its order before the rotation are those of the published weights.
"""

from __future__ import annotations

import torch

from megacogvx_kernels.checks import (
    require_count,
    require_floating,
    require_integer,
    require_one_device,
    require_one_dtype,
    require_positive,
    require_sample_table,
    require_shape,
    require_vectors,
)
from megacogvx_kernels.qk_norm_rope import compiled, reference
from megacogvx_kernels.qk_norm_rope.shared_gradient import take_v

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
            (megatron-core's layout). S, at least one, are consecutive tokens of a pack.
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
        TypeError, ValueError: an argument has the wrong type, shape, device or layout, the samples of the table don't
            follow each other or end before the last token; it is named.
    """
    split_SN3K = _split_by_head(qkv_SN3K, q_weight_K)
    parameters = {"q_weight_K": q_weight_K, "q_bias_K": q_bias_K, "k_weight_K": k_weight_K, "k_bias_K": k_bias_K}
    tables = {"sample_table_M5": sample_table_M5, "rope_grid_M6": rope_grid_M6}
    _check_parameters(split_SN3K, parameters, tables)
    require_count("token_offset", token_offset)
    require_positive("eps", eps)
    require_positive("theta", theta)
    _check_rotation(split_SN3K, sample_table_M5, token_offset, axes, rotate)
    implementation = compiled if compiled.takes(split_SN3K, rotate) else reference
    return implementation.qk_norm_rope(
        split_SN3K, q_weight_K, q_bias_K, k_weight_K, k_bias_K, sample_table_M5, rope_grid_M6, token_offset,
        eps=eps, axes=axes, theta=theta, rotate=rotate,
    )  # fmt: skip


def _split_by_head(qkv_SN3K: torch.Tensor, q_weight_K: torch.Tensor) -> torch.Tensor:
    require_shape("q_weight_K", q_weight_K, (None,))
    width = q_weight_K.shape[0]
    require_floating("qkv_SN3K", qkv_SN3K)
    if not width or qkv_SN3K.dim() < 2 or not qkv_SN3K.numel() or qkv_SN3K.numel() % (3 * width):
        raise ValueError(
            f"qkv_SN3K has the shape {tuple(qkv_SN3K.shape)}; expected [S, N, 3, K] with K={width}, S and N at least 1"
        )
    require_vectors("qkv_SN3K", qkv_SN3K)
    return qkv_SN3K.reshape(qkv_SN3K.shape[0], -1, 3, width)


def _check_parameters(
    split_SN3K: torch.Tensor, parameters: dict[str, torch.Tensor], tables: dict[str, torch.Tensor]
) -> None:
    for name, vector in parameters.items():
        require_shape(name, vector, (split_SN3K.shape[-1],))
    require_one_dtype(**parameters)
    table_M5, grid_M6 = tables.values()
    require_shape("sample_table_M5", table_M5, (None, 5))
    require_integer("sample_table_M5", table_M5)
    require_shape("rope_grid_M6", grid_M6, (table_M5.shape[0], 6))
    require_floating("rope_grid_M6", grid_M6)
    require_one_device(qkv_SN3K=split_SN3K, **parameters, **tables)


def _check_rotation(
    split_SN3K: torch.Tensor, table_M5: torch.Tensor, token_offset: int, axes: tuple[int, int, int], rotate: bool
) -> None:
    width = split_SN3K.shape[-1]
    if width % 2:
        raise ValueError(f"q_weight_K and with it a head have K={width} channels; rotation needs an even number")
    if rotate and (len(axes) != 3 or sum(axes) != width or any(axis % 2 or axis < 0 for axis in axes)):
        raise ValueError(f"axes={tuple(axes)} must be three even numbers that sum to K={width}")
    require_sample_table("sample_table_M5", table_M5, token_offset, split_SN3K.shape[0])
