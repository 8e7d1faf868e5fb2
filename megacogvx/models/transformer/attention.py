"""Full attention over text and video of each sample, with QK-norm and 3D-RoPE (paper section 2.2)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import nn

from megacogvx.log import get_logger
from megacogvx.models.transformer.config import CogVideoXConfig
from megacogvx.models.transformer.rope import rotate_in_own_dtype
from megacogvx.pack_layout import LocalPack, PackLayout
from megacogvx.parallel.context_parallel import heads_to_tokens, tokens_to_heads
from megacogvx.parallel.groups import ParallelGroups
from megacogvx.parallel.megatron import CoreConfig
from megacogvx.parallel.recompute import Discarded
from megacogvx.parallel.ring_attention import ring_attention
from megacogvx.parallel.sequence_parallel import sum_gradient_over_tensor_ranks
from megacogvx.parallel.tensor_parallel import column_linear, row_linear
from megacogvx_kernels.packed_attention import choose_backend, packed_attention
from megacogvx_kernels.qk_norm_rope import qk_norm_rope, take_v

logger = get_logger(__name__)


class JointAttention(nn.Module):
    """One attention for both modalities; tensor ranks hold heads, context ranks exchange tokens for heads.

    Where the context ranks form rings, those of a ring keep their tokens and exchange keys and values instead.

    `qkv` is laid out per head, q then k then v, so that a cut by rows is a cut by heads.
    """

    def __init__(self, config: CogVideoXConfig, core: CoreConfig, groups: ParallelGroups) -> None:
        super().__init__()
        self.config, self.groups, self.backend = config, groups, core.packed_attention_backend
        width, dtype = config.attention_head_dim, core.params_dtype
        self.qkv = column_linear(config.hidden_size, 3 * config.hidden_size, core, groups)
        self.q_norm = nn.LayerNorm(width, config.qk_norm_eps, dtype=dtype)
        self.k_norm = nn.LayerNorm(width, config.qk_norm_eps, dtype=dtype)
        self.out = row_linear(config.hidden_size, config.hidden_size, core, groups)
        # every tensor rank sees only its heads
        sum_gradient_over_tensor_ranks(self.q_norm, self.k_norm, core=core)

    def heads(
        self, hidden_S1D: torch.Tensor, layout: PackLayout, local: LocalPack, discarded: Discarded
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return q, k and v for this rank's share of the heads, `[S/r, N/(t u), K]` each.

        Args:
            hidden_S1D: `[S_local, 1, D]`; at the right S are all tokens of the pack, t tensor, c = u r context ranks in
                rings of r (1: every rank sees all tokens), u of which exchange heads.
            layout, local: the pack and this rank's share.
            discarded: makes q and k, the exchange between context ranks included.
        """
        return self.exchange(self.qkv(hidden_S1D), layout, local, discarded)

    def exchange(
        self, qkv_S1X: torch.Tensor, layout: PackLayout, local: LocalPack, discarded: Discarded
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what `heads` returns, from the projection `[S/c, 1, 3 N/t K]` of this rank's tokens."""
        # fmt: off
        qkv_SN3K, v_SNK = take_v(self._by_head(qkv_S1X))                             # [S/c, N/t, 3, K], v of it
        q_SNK, k_SNK = discarded.run(self._q_and_k, qkv_SN3K, layout, local)         # [S/r, N/(t u), K] each
        v_SNK = tokens_to_heads(v_SNK, self.groups.ulysses_group)                    # [S/r, N/(t u), K]
        return q_SNK, k_SNK, v_SNK
        # fmt: on

    def attend(self, q_SNK: torch.Tensor, k_SNK: torch.Tensor, v_SNK: torch.Tensor, layout: PackLayout) -> torch.Tensor:
        """Return the attention `[S/r, N/(t u), K]` of what `heads` gave."""
        boundaries, ring = layout.boundaries[:-1], self.groups.ring[1]
        if ring > 1:
            _say(f"ring of {ring}", "parallel.ring_size")
            return ring_attention(q_SNK, k_SNK, v_SNK, boundaries, self.groups.ring_group)
        chosen = choose_backend(q_SNK, boundaries, self.backend)
        _say(chosen.name, chosen.why)
        cu_seqlens = layout.cu_seqlens(q_SNK.device)
        return packed_attention(q_SNK, k_SNK, v_SNK, boundaries, cu_seqlens=cu_seqlens, backend=chosen.name)

    def project(self, out_SNK: torch.Tensor) -> torch.Tensor:
        """Return the output `[S_local, 1, D]` for this rank's tokens of what `attend` gave."""
        return self.out(self.collect(out_SNK))

    def collect(self, out_SNK: torch.Tensor) -> torch.Tensor:
        """Return the attention of this rank's tokens, all its tensor share of the heads together, `[S/c, 1, N/t K]`."""
        out_SNK = heads_to_tokens(out_SNK, self.groups.ulysses_group)  # [S/c, N/t, K]
        return out_SNK.flatten(1)[:, None]

    def _by_head(self, qkv_S1X: torch.Tensor) -> torch.Tensor:
        return qkv_S1X.squeeze(1).unflatten(-1, (-1, 3, self.config.attention_head_dim))

    def _q_and_k(
        self, qkv_SN3K: torch.Tensor, layout: PackLayout, local: LocalPack
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q_SNK, k_SNK = self._norm_and_rotate(qkv_SN3K, layout, local)  # [S/c, N/t, K] each
        group = self.groups.ulysses_group
        return tokens_to_heads(q_SNK, group), tokens_to_heads(k_SNK, group)

    def _norm_and_rotate(
        self, qkv_SN3K: torch.Tensor, layout: PackLayout, local: LocalPack
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rotate, narrow = self.config.use_rotary_positional_embeddings, self.config.rope_precision == "weights"
        q_SNK, k_SNK = qk_norm_rope(
            qkv_SN3K,
            self.q_norm.weight,
            self.q_norm.bias,
            self.k_norm.weight,
            self.k_norm.bias,
            layout.sample_table(qkv_SN3K.device),
            layout.rope_grid(qkv_SN3K.device),
            local.context_tokens.start,
            eps=self.config.qk_norm_eps,
            axes=self.config.rope_axes,
            theta=self.config.rope_theta,
            rotate=rotate and not narrow,
        )
        if rotate and narrow:
            return rotate_in_own_dtype((q_SNK, k_SNK), layout, local.context_tokens.start, self.config)
        return q_SNK, k_SNK


@lru_cache
def _say(backend: str, why: str) -> None:
    """Log which kernel answers, once for each."""
    logger.info("attention: %s (%s)", backend, why)
