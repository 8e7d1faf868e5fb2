"""What the paper compares its design with (section 4.1, figures 8 and 10).

`model.block` and `model.attention` choose these instead of the published block and attention:

- "shared_adaln": one shift, scale and gate for text and video, half of the modulation's parameters.
- "mmdit": each modality has its own linear layers and they meet in the attention (Esser et al. 2024, figure 2). The
  norms' 4 (D + K) weights and biases a block stay shared; the modulation is the expert one, which is per modality.
- "2d_1d": layers alternate between attention within a frame and along time (as in Singer et al. 2022), with the same
  parameters.

The other two ablations are settings that the model has anyway: `use_rotary_positional_embeddings=false` for sinusoidal
positions, and `diffusion.timestep_sampling=independent` for timesteps without strata.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import nn

from megacogvx.models.transformer.attention import JointAttention
from megacogvx.models.transformer.block import RECOMPUTES_MLP, CogVideoXBlock
from megacogvx.models.transformer.config import CogVideoXConfig
from megacogvx.models.transformer.mlp import MLP
from megacogvx.pack_layout import LocalPack, PackLayout, PackSample
from megacogvx.parallel.groups import ParallelGroups
from megacogvx.parallel.recompute import Discarded
from megacogvx.parallel.tensor_parallel import ModulationLinear, column_linear, row_linear
from megacogvx_kernels.adaln import gated_residual, gated_residual_adaln
from megacogvx_kernels.packed_attention import packed_attention


def make_block(
    config: CogVideoXConfig, core: TransformerConfig, groups: ParallelGroups, layer: int, policy: str
) -> CogVideoXBlock:
    """Return the block of `layer` (counted over all pipeline stages) that the config asks for."""
    kind = MMDiTBlock if config.block == "mmdit" else CogVideoXBlock
    block = kind(config, core, groups, policy)
    if config.block == "shared_adaln":
        block.attention_modulation = SharedModulation(config, core, groups)
        block.mlp_modulation = SharedModulation(config, core, groups)
    if config.attention == "2d_1d":
        block.attention = FactorisedAttention(config, core, groups, along_time=layer % 2 == 1)
    return block


class SharedModulation(ModulationLinear):
    """Condition `[M, time_embed_dim]` -> table `[M * 2, 3, D]` whose rows of video and text are the same."""

    def __init__(self, config: CogVideoXConfig, core: TransformerConfig, groups: ParallelGroups) -> None:
        super().__init__(config.time_embed_dim, 3 * config.hidden_size, core, groups)
        self.hidden_size = config.hidden_size

    def forward(self, condition_ME: torch.Tensor) -> torch.Tensor:
        """Return the table of the expert modulation: rows 2 m and 2 m + 1 are sample m."""
        return super().forward(F.silu(condition_ME)).reshape(-1, 3, self.hidden_size).repeat_interleave(2, dim=0)


class MMDiTBlock(CogVideoXBlock):
    """A block whose linear layers know one modality each; what the published block has is the video's."""

    def __init__(
        self, config: CogVideoXConfig, core: TransformerConfig, groups: ParallelGroups, policy: str = "none"
    ) -> None:
        super().__init__(config, core, groups, policy)
        self.text_qkv = column_linear(config.hidden_size, 3 * config.hidden_size, core, groups)
        self.text_out = row_linear(config.hidden_size, config.hidden_size, core, groups)
        self.text_mlp = MLP(config, core, groups, keep_gelu=policy in RECOMPUTES_MLP)

    def _below(
        self,
        hidden_S1D: torch.Tensor,
        modulation1_R3D: torch.Tensor,
        layout: PackLayout,
        local: LocalPack,
        q_and_k: Discarded,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        normed_S1D = self._modulate(self.attention_norm, hidden_S1D, modulation1_R3D, local)
        qkv_S1X = each_modality(self.attention.qkv, self.text_qkv, normed_S1D, local)
        return self.attention.exchange(qkv_S1X, layout, local, q_and_k)

    def _above(
        self,
        hidden_S1D: torch.Tensor,
        out_SNK: torch.Tensor,
        modulation1_R3D: torch.Tensor,
        modulation2_R3D: torch.Tensor,
        local: LocalPack,
    ) -> torch.Tensor:
        rows_S, norm = local.modulation_rows, self.mlp_norm
        branch_S1D = each_modality(self.attention.out, self.text_out, self.attention.collect(out_SNK), local)
        hidden_S1D, normed_S1D = gated_residual_adaln(
            hidden_S1D, branch_S1D, modulation1_R3D, norm.weight, norm.bias, modulation2_R3D, rows_S, eps=norm.eps
        )
        branch_S1D = each_modality(self.mlp, self.text_mlp, normed_S1D, local)
        return gated_residual(hidden_S1D, branch_S1D, modulation2_R3D, rows_S)


def each_modality(video: nn.Module, text: nn.Module, tokens_S1D: torch.Tensor, local: LocalPack) -> torch.Tensor:
    """Return `video` of the video tokens and `text` of the text tokens, in the order of the tokens."""
    video_V1X = video(tokens_S1D.index_select(0, local.video_index))
    text_L1X = text(tokens_S1D.index_select(0, local.text_index))
    return torch.cat([video_V1X, text_L1X]).index_select(0, local.order)


class FactorisedAttention(JointAttention):
    """Attention within each frame, or along time at each place.

    In a layer of the first kind the text joins every frame and takes the mean of what it got from them, so that text
    and video still see each other; in one of the second the text attends to itself.

    Args:
        config, core, groups: as of `JointAttention`.
        along_time: which kind.
    """

    def __init__(
        self, config: CogVideoXConfig, core: TransformerConfig, groups: ParallelGroups, along_time: bool
    ) -> None:
        super().__init__(config, core, groups)
        self.along_time = along_time

    def attend(self, q_SNK: torch.Tensor, k_SNK: torch.Tensor, v_SNK: torch.Tensor, layout: PackLayout) -> torch.Tensor:
        """Return the attention `[S, N/(t c), K]` of what `heads` gave; there is no ring."""
        assert len(q_SNK) == layout.num_tokens, f"{len(q_SNK)} of {layout.num_tokens} tokens: frames would be cut"
        tokens_X, boundaries = sequences_of(layout, self.along_time)
        tokens_X = tokens_X.to(q_SNK.device)
        q_XNK, k_XNK, v_XNK = (x_SNK.index_select(0, tokens_X) for x_SNK in (q_SNK, k_SNK, v_SNK))
        out_XNK = packed_attention(q_XNK, k_XNK, v_XNK, boundaries, backend=self.backend)
        times_S = torch.bincount(tokens_X, minlength=len(q_SNK)).clamp(min=1)
        return torch.zeros_like(q_SNK).index_add(0, tokens_X, out_XNK) / times_S[:, None, None].to(q_SNK.dtype)


def sequences_of(layout: PackLayout, along_time: bool) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Return what a layer of 2D+1D attention attends within.

    Returns:
        places in the pack of the tokens of all sequences, one after the other, int64; and where each sequence begins,
        then the end of the last.
    """
    parts = [
        start + sequence
        for start, sample in zip(layout.boundaries, layout.samples[:-1], strict=False)
        for sequence in _sequences(sample, along_time)
    ]
    boundaries = [0]
    for part in parts:
        boundaries.append(boundaries[-1] + len(part))
    return torch.cat(parts), tuple(boundaries)


def _sequences(sample: PackSample, along_time: bool) -> Iterator[torch.Tensor]:
    text, frame = torch.arange(sample.text_length), sample.grid[1] * sample.grid[2]
    video_TX = sample.text_length + torch.arange(sample.video_length).reshape(-1, frame)
    if along_time:
        yield text
        yield from video_TX.T
    else:
        for frame_X in video_TX:
            yield torch.cat([text, frame_X])
