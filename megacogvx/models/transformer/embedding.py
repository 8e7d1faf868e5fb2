"""Rows of patches, text and timesteps -> tokens and condition: what stands below the first block in figure 3.

The one place where rows become tokens `[S, 1, D]`: a sample's text tokens, then its video tokens (t, h, w).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import nn

from megacogvx.models.transformer.config import CogVideoXConfig
from megacogvx.pack_layout import PADDING_ID, LocalPack, PackLayout, RowSlice
from megacogvx.parallel.sequence_parallel import sum_gradient_over_tensor_ranks
from megacogvx.patches import Triple

OFS = 2.0  # the motion offset that the 1.5 image-to-video weights were made with


class PackEmbedding(nn.Module):
    """Video rows and text rows of one rank -> its tokens; positions are added where the model has any to add.

    The weights are whole on every tensor rank, unlike the AdaLN projections (14% of the 5B model), which are cut.
    The two projections here hold 12.8 of its 5,570 M parameters (0.23%; 0.27% with the time embedding and the head's
    projection) and do 0.004% of the FLOPs of a 480 x 720 video. Each rank projects its own tokens alone, so cutting the
    features would save a share of 77 MB (bf16 weights, fp32 gradients) and add an exchange of all tokens `[S, D]`.
    """

    positions: torch.Tensor

    def __init__(self, config: CogVideoXConfig, core: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        dtype = core.params_dtype
        self.video_proj = nn.Linear(config.row_size_in, config.hidden_size, dtype=dtype)
        self.text_proj = nn.Linear(config.text_embed_dim, config.hidden_size, dtype=dtype)
        sum_gradient_over_tensor_ranks(self.video_proj, self.text_proj, core=core)
        if config.use_learned_positional_embeddings:
            rows = config.max_text_seq_length + math.prod(config.native_grid)
            self.register_buffer("positions", torch.zeros(rows, config.hidden_size, dtype=dtype))

    def forward(
        self, video_VP: torch.Tensor, text_LE: torch.Tensor, layout: PackLayout, local: LocalPack
    ) -> torch.Tensor:
        """Return this rank's tokens `[S_local, 1, D]`.

        Args:
            video_VP: rows of patches of this rank's video tokens, in the order of `local.video_index`.
            text_LE: text embeddings of its text tokens (zeros for the padding), in the order of `local.text_index`.
            layout, local: the pack, whose samples fit the learned position table (`check_pack`), and this rank's share.
        """
        video_VD = self.video_proj(video_VP)
        text_LD = self.text_proj(text_LE)
        if self.config.use_learned_positional_embeddings:
            video_VD = video_VD + self._learned(layout, local.video_slices, is_text=False)
            text_LD = text_LD + self._learned(layout, local.text_slices, is_text=True)
        elif not self.config.use_rotary_positional_embeddings:
            video_VD = video_VD + self._sincos(layout, local).to(video_VD)
        # A copy into place would keep both for its gradient.
        return torch.cat([video_VD, text_LD]).index_select(0, local.order)[:, None]

    def _sincos(self, layout: PackLayout, local: LocalPack) -> torch.Tensor:
        """Return the codes of this rank's video tokens, fp64 `[V_local, D]`."""
        config, device = self.config, local.video_index.device
        scales = config.temporal_interpolation_scale, config.spatial_interpolation_scale
        parts = [torch.empty(0, config.hidden_size, dtype=torch.float64, device=device)]
        for rows in local.video_slices:
            place = torch.arange(rows.start, rows.stop, device=device)
            parts.append(sincos_positions(place, layout.samples[rows.sample].grid, config.hidden_size, *scales))
        return torch.cat(parts)

    def _learned(self, layout: PackLayout, slices: tuple[RowSlice, ...], is_text: bool) -> torch.Tensor:
        """Return the table's rows for this rank's text or video tokens; zeros for the padding."""
        parts = [self.positions[:0]]
        for rows in slices:
            sample = layout.samples[rows.sample]
            if sample.sample_id == PADDING_ID:
                parts.append(self.positions.new_zeros(rows.stop - rows.start, self.config.hidden_size))
                continue
            first = 0 if is_text else self.config.max_text_seq_length
            parts.append(self.positions[first + rows.start : first + rows.stop])
        return torch.cat(parts)


class TimeEmbedding(nn.Module):
    """Timesteps -> the condition of all modulations, once per forward; the motion offset is added where it is used."""

    def __init__(self, config: CogVideoXConfig, core: TransformerConfig) -> None:
        super().__init__()
        self.hidden_size, self.ofs_embed_dim = config.hidden_size, config.ofs_embed_dim
        self.timestep = _ConditionMLP(config.hidden_size, config.time_embed_dim, core.params_dtype)
        if config.ofs_embed_dim is not None:
            self.ofs = _ConditionMLP(config.ofs_embed_dim, config.ofs_embed_dim, core.params_dtype)

    def forward(self, timesteps_M: torch.Tensor) -> torch.Tensor:
        """Return the condition `[M, time_embed_dim]`; `timesteps_M` int64, one per sample, 0 for the padding.

        Every tensor rank computes the same from all samples, and `ModulationLinear` hands each the whole gradient, so
        nothing here is summed over tensor ranks.
        """
        condition_ME = self.timestep(sinusoid(timesteps_M, self.hidden_size))
        if self.ofs_embed_dim is not None:
            ofs_1 = torch.full((1,), OFS, device=timesteps_M.device)
            condition_ME = condition_ME + self.ofs(sinusoid(ofs_1, self.ofs_embed_dim))
        return condition_ME


class _ConditionMLP(nn.Module):
    def __init__(self, width_in: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width_in, width, dtype=dtype)
        self.linear_2 = nn.Linear(width, width, dtype=dtype)

    def forward(self, code_MX: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.silu(self.linear_1(code_MX.to(self.linear_1.weight.dtype))))


def sinusoid(values_M: torch.Tensor, width: int) -> torch.Tensor:
    """Return fp32 `[M, width]`: cos(x f_j), then sin(x f_j), with f_j = 10000^(-j / (width / 2))."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=values_M.device) / half)
    angles = values_M.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def sincos_positions(
    place_V: torch.Tensor, grid: Triple, width: int, temporal_scale: float, spatial_scale: float
) -> torch.Tensor:
    """Return the additive code of video tokens, fp64 `[V, width]`: a quarter for t, 3/8 for w, then 3/8 for h.

    Args:
        place_V: int64, which tokens of the sample, counted in (t, h, w) order.
        grid: tokens along (t, h, w).
        width: D.
        temporal_scale, spatial_scale: what positions are divided by.
    """
    _, height, width_tokens = grid
    frame, row, column = place_V // (height * width_tokens), place_V // width_tokens % height, place_V % width_tokens
    # Positions are divided in fp32 and the rest is fp64, as in the published code; width before height is its order.
    parts = [
        _axis_code(frame.float() / temporal_scale, width // 4),
        _axis_code(column.float() / spatial_scale, 3 * width // 8),
        _axis_code(row.float() / spatial_scale, 3 * width // 8),
    ]
    return torch.cat(parts, dim=1)


def _axis_code(position_V: torch.Tensor, channels: int) -> torch.Tensor:
    half = channels // 2
    exponent = torch.arange(half, dtype=torch.float64, device=position_V.device) / half
    angles = position_V.double()[:, None] / 10000.0**exponent
    return torch.cat([angles.sin(), angles.cos()], dim=1)
