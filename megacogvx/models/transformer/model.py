"""The whole transformer: rows of patches in, velocity rows out, for the tokens of a pack that one rank holds."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.utils import make_viewless_tensor  # the schedule frees what a stage sent, never a view
from torch import nn

from megacogvx.errors import ConfigError
from megacogvx.models.transformer.ablations import make_block
from megacogvx.models.transformer.checks import check_pack, check_rows
from megacogvx.models.transformer.config import CogVideoXConfig
from megacogvx.models.transformer.embedding import PackEmbedding, TimeEmbedding
from megacogvx.models.transformer.head import PackHead
from megacogvx.models.transformer.rope import place_on_rope_grid
from megacogvx.pack_layout import LocalPack, PackLayout
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.groups import ParallelGroups
from megacogvx.parallel.megatron import CoreConfig, core_config
from megacogvx.parallel.pipeline_parallel import hold_on_every_stage
from megacogvx.parallel.recompute import block_policy
from megacogvx.parallel.sharded_state import sharded_state_dict


def transformer_core(
    config: CogVideoXConfig, parallel: ParallelConfig, groups: ParallelGroups, dtype: torch.dtype
) -> CoreConfig:
    """Return megatron-core's settings for this transformer.

    Raises:
        ConfigError: the heads can't be cut over tensor and context ranks, a pipeline stage would hold no layer, or the
            model is an ablation that doesn't run on this layout.
    """
    problem = config.layout_problem(groups.tensor[1], groups.ring[1], parallel.recompute)
    if problem:
        raise ConfigError(problem)
    return core_config(
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        ffn_hidden_size=config.ffn_hidden_size,
        parallel=parallel,
        groups=groups,
        dtype=dtype,
        norm_eps=config.norm_eps,
    )


class CogVideoXTransformer(nn.Module):
    """Expert-AdaLN diffusion transformer over packs (CogVideoX paper section 2.2, figure 3).

    Weights are allocated and not filled; `initialize_weights` or a checkpoint does that. Built under
    `torch.device("meta")` nothing is allocated either.

    With pipeline stages this is one stage: the first holds the embedding, the last the head, each its blocks under
    their global names (`blocks.7`) and the time embedding, which the modulations of all blocks read.

    Args:
        config: section `model`.
        core: megatron-core's settings (`transformer_core`); parameters have `core.params_dtype`.
        groups: process groups.
    """

    def __init__(self, config: CogVideoXConfig, core: CoreConfig, groups: ParallelGroups) -> None:
        super().__init__()
        self.config, self.core, self.groups = config, core, groups
        self.pre_process, self.post_process = groups.is_first_stage, groups.is_last_stage
        self.time = TimeEmbedding(config, core)
        hold_on_every_stage(self.time, groups)
        self.embedding = PackEmbedding(config, core) if self.pre_process else None
        self.blocks = nn.ModuleDict(
            {
                str(layer): make_block(config, core, groups, layer, block_policy(core.recompute, place))
                for place, layer in enumerate(core.stage_layers)
            }
        )
        self.head = PackHead(config, core, groups) if self.post_process else None
        self._received_S1D: torch.Tensor | None = None

    def set_input_tensor(self, received: list[torch.Tensor | None]) -> None:
        """Take what the previous pipeline stage sent, `[S_local, 1, D]`, for the next forward; None on the first."""
        (self._received_S1D,) = received

    def forward(
        self, video_VP: torch.Tensor, text_LE: torch.Tensor, timesteps_M: torch.Tensor, layout: PackLayout
    ) -> torch.Tensor:
        """Predict the velocity of this rank's video rows; on a pipeline stage that isn't the last, return its tokens.

        Args:
            video_VP: noisy rows `[V_local, P]`, P = in_channels * q * p * p in (c, q, p, p) order, of the tokens
                `layout.local(groups.tensor, groups.context).video_index`, in the parameters' dtype. Only the first
                stage reads rows and text.
            text_LE: text embeddings `[L_local, E]` of its `text_index`; zeros for the padding.
            timesteps_M: int64 `[M]`, 0 .. 999, of every sample of the pack; 0 for the padding.
            layout: the pack, the same on every rank.

        Returns:
            `[V_local, P]` with P = out_channels * q * p * p; from a stage that isn't the last `[S_local, 1, D]`.

        Raises:
            DataError: the pack is empty, a text is longer than the model's, a sample is larger than the rope grid or
                doesn't fit the learned position table, or rows have another width than the model reads.
            ConfigError: the pack's tokens don't divide by the ranks.
        """
        local = layout.local(self.groups.tensor, self.groups.context, timesteps_M.device)
        self._check(video_VP, text_LE, timesteps_M, layout, local)
        # fmt: off
        condition_ME = self.time(timesteps_M)                                   # [M, time_embed_dim], once
        hidden_S1D = self._tokens(video_VP, text_LE, layout, local)             # [S_local, 1, D]
        for block in self.blocks.values():
            hidden_S1D = block(hidden_S1D, condition_ME, layout, local)         # [S_local, 1, D]
        if self.head is None:
            return make_viewless_tensor(hidden_S1D, True, keep_graph=True)      # [S_local, 1, D], to the next stage
        return self.head(hidden_S1D, condition_ME, local)                       # [V_local, P]
        # fmt: on

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[tuple[int, int, int], ...] = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Return every parameter and buffer as megatron-core's `ShardedTensor`, under its global name.

        Rows of `attention.qkv` are laid out by heads and every other cut is a plain one, so a checkpoint of any number
        of tensor ranks and pipeline stages loads into any other.

        Args:
            prefix: put before each name.
            sharded_offsets: cuts that the caller has made already; this model has none.
            metadata: megatron-core's; not read.
        """
        assert not sharded_offsets, f"{sharded_offsets}: blocks are not stacked into one tensor"
        return sharded_state_dict(self, self.groups, prefix)

    def _tokens(
        self, video_VP: torch.Tensor, text_LE: torch.Tensor, layout: PackLayout, local: LocalPack
    ) -> torch.Tensor:
        """Return the tokens that enter this stage's first block: embedded here, or received."""
        if self.embedding is not None:
            return self.embedding(video_VP, text_LE, layout, local)
        received_S1D, self._received_S1D = self._received_S1D, None
        shape = (len(local.tokens), 1, self.config.hidden_size)
        assert received_S1D is not None, "a later pipeline stage runs without the schedule, or twice on one input"
        assert received_S1D.shape == shape, f"received {tuple(received_S1D.shape)}, not {shape}: is pack_tokens right?"
        return received_S1D

    def _check(
        self,
        video_VP: torch.Tensor,
        text_LE: torch.Tensor,
        timesteps_M: torch.Tensor,
        layout: PackLayout,
        local: LocalPack,
    ) -> None:
        config = self.config
        check_pack(config, layout)
        assert layout.patch == config.patch, f"a pack of patch {layout.patch} for a model of patch {config.patch}"
        placed = config.rope_grid == "slice" or place_on_rope_grid(layout, config) is layout
        assert placed, f"model.rope_grid={config.rope_grid}: pass layouts through place_on_rope_grid first"
        assert timesteps_M.shape == (layout.num_samples,), f"{tuple(timesteps_M.shape)}, not ({layout.num_samples},)"
        if self.pre_process:
            check_rows(config, video_VP, text_LE)
            assert len(video_VP) == len(local.video_index), f"{len(video_VP)} rows, not {len(local.video_index)}"
            assert len(text_LE) == len(local.text_index), f"{len(text_LE)} text rows, not {len(local.text_index)}"
