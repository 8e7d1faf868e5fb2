"""The plain definition of `qk_norm_rope`, differentiable through autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F


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
    eps: float,
    axes: tuple[int, int, int],
    theta: float,
    rotate: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm q and k over K, rotate those of video tokens; see the public function for the arguments."""
    q_SNK, k_SNK, _ = qkv_SN3K.unbind(2)  # one gradient of the size of qkv; two slices would make one each
    q_SNK = _norm(q_SNK, q_weight_K, q_bias_K, eps)
    k_SNK = _norm(k_SNK, k_weight_K, k_bias_K, eps)
    if rotate:
        tokens_S = token_offset + torch.arange(qkv_SN3K.shape[0], device=qkv_SN3K.device)
        angles_SK = rotary_angles(tokens_S, sample_table_M5, rope_grid_M6.to(q_SNK.dtype), axes, theta)
        cos_S1K, sin_S1K = angles_SK.cos()[:, None], angles_SK.sin()[:, None]
        q_SNK = q_SNK * cos_S1K + quarter_turn(q_SNK) * sin_S1K
        k_SNK = k_SNK * cos_S1K + quarter_turn(k_SNK) * sin_S1K
    return q_SNK.to(qkv_SN3K.dtype), k_SNK.to(qkv_SN3K.dtype)


def rotary_angles(
    tokens_S: torch.Tensor,
    sample_table_M5: torch.Tensor,
    rope_grid_M6: torch.Tensor,
    axes: tuple[int, int, int],
    theta: float,
) -> torch.Tensor:
    """Return `[S, K]`: the angle of each channel (both of a pair alike); zeros for text and padding."""
    position_S3, is_video_S = positions(tokens_S, sample_table_M5, rope_grid_M6)
    parts = []
    for axis, channels in enumerate(axes):
        exponent = torch.arange(0, channels, 2, dtype=position_S3.dtype, device=tokens_S.device) / channels
        angle = position_S3[:, axis, None] * (1.0 / theta**exponent)
        parts.append(angle.repeat_interleave(2, dim=1))
    return torch.cat(parts, dim=1) * is_video_S[:, None]


def positions(
    tokens_S: torch.Tensor, sample_table_M5: torch.Tensor, rope_grid_M6: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rotary position (t, h, w) of each token of the pack, `[S, 3]`, and whether it is video."""
    table = sample_table_M5.long()
    sample_S = torch.searchsorted(table[:, 0].contiguous(), tokens_S, right=True) - 1
    start, text, frames, height, width = table[sample_S].unbind(1)
    place = tokens_S - start - text  # place among the sample's video tokens, in (t, h, w) order
    is_video_S = (place >= 0) & (place < frames * height * width)
    height, width = height.clamp(min=1), width.clamp(min=1)  # the padding has no grid
    cell = torch.stack([place // (height * width), place // width % height, place % width], dim=1)
    grid = rope_grid_M6[sample_S]
    return grid[:, :3] + grid[:, 3:] * cell.to(grid.dtype), is_video_S


def _norm(x_SNK: torch.Tensor, weight_K: torch.Tensor, bias_K: torch.Tensor, eps: float) -> torch.Tensor:
    precision = torch.promote_types(x_SNK.dtype, torch.float32)
    return F.layer_norm(x_SNK.to(precision), weight_K.shape, weight_K.to(precision), bias_K.to(precision), eps)


def quarter_turn(x_SNK: torch.Tensor) -> torch.Tensor:
    """(a, b) -> (-b, a) for each pair of neighbouring channels."""
    pairs = x_SNK.unflatten(-1, (-1, 2))
    return torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
