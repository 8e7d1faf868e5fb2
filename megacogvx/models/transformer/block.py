"""One block of the expert transformer (paper figure 3)."""

from __future__ import annotations

import torch
from torch import nn

from megacogvx.models.transformer.attention import JointAttention
from megacogvx.models.transformer.config import CogVideoXConfig
from megacogvx.models.transformer.mlp import MLP
from megacogvx.models.transformer.modulation import ExpertModulation
from megacogvx.pack_layout import LocalPack, PackLayout
from megacogvx.parallel.groups import ParallelGroups
from megacogvx.parallel.megatron import CoreConfig
from megacogvx.parallel.recompute import Discarded, recompute
from megacogvx.parallel.sequence_parallel import sum_gradient_over_tensor_ranks
from megacogvx.parallel.tensor_parallel import ModulationLinear
from megacogvx_kernels.adaln import adaln_modulate, gated_residual, gated_residual_adaln

RECOMPUTES_MLP = ("full", "keep_attention")  # policies


class CogVideoXBlock(nn.Module):
    """Attention, then MLP, each between an expert AdaLN and a gated residual.

    Text and video are one tensor; only the modulation (by `rows`) and the rotation (inside attention) tell them
    apart.

    Args:
        config: section `model`.
        core: megatron-core's settings.
        groups: process groups.
        policy: what the backward pass computes again, one of `parallel.recompute.POLICIES`. The modulation tables are
            small and always kept.
    """

    def __init__(self, config: CogVideoXConfig, core: CoreConfig, groups: ParallelGroups, policy: str = "none") -> None:
        super().__init__()
        self.policy = policy
        # "full": once more within what is computed again, so that none of it is there while the MLP, the widest part,
        # has its backward pass; but q and k not where context ranks would have to exchange them once more.
        self._discards_norm = policy in ("selective", "full")
        self._discards_q_and_k = policy == "selective" or (policy == "full" and groups.ulysses_group.size() == 1)
        dtype = core.params_dtype
        self.attention_modulation: ModulationLinear = ExpertModulation(config, core, groups)
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.attention = JointAttention(config, core, groups)
        self.mlp_modulation: ModulationLinear = ExpertModulation(config, core, groups)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.mlp = MLP(config, core, groups, keep_gelu=policy in RECOMPUTES_MLP)
        # every tensor rank sees only its tokens
        sum_gradient_over_tensor_ranks(self.attention_norm, self.mlp_norm, core=core)

    def forward(
        self, hidden_S1D: torch.Tensor, condition_ME: torch.Tensor, layout: PackLayout, local: LocalPack
    ) -> torch.Tensor:
        """Return the tokens after this block.

        Args:
            hidden_S1D: this rank's tokens `[S_local, 1, D]`.
            condition_ME: condition of every sample of the pack `[M, time_embed_dim]`.
            layout, local: the pack and this rank's share.
        """
        # fmt: off
        modulation1_R3D = self.attention_modulation(condition_ME)                            # [2 M, 3, D]
        modulation2_R3D = self.mlp_modulation(condition_ME)                                  # [2 M, 3, D]
        # fmt: on
        inputs = (hidden_S1D, modulation1_R3D, modulation2_R3D, layout, local)
        return recompute(self._forward, *inputs) if self.policy == "full" else self._forward(*inputs)

    def _forward(
        self,
        hidden_S1D: torch.Tensor,
        modulation1_R3D: torch.Tensor,
        modulation2_R3D: torch.Tensor,
        layout: PackLayout,
        local: LocalPack,
    ) -> torch.Tensor:
        below = Discarded(self.policy == "keep_attention")
        q_and_k = Discarded(self._discards_q_and_k)
        # fmt: off
        q_SNK, k_SNK, v_SNK = below.run(self._below, hidden_S1D, modulation1_R3D, layout, local, q_and_k)
        out_SNK = self.attention.attend(q_SNK, k_SNK, v_SNK, layout)                         # [S/r, N/(t u), K]
        below.until(out_SNK)
        q_and_k.until(out_SNK)
        above = (hidden_S1D, out_SNK, modulation1_R3D, modulation2_R3D, local)
        return recompute(self._above, *above) if self.policy == "keep_attention" else self._above(*above)
        # fmt: on

    def _below(
        self,
        hidden_S1D: torch.Tensor,
        modulation1_R3D: torch.Tensor,
        layout: PackLayout,
        local: LocalPack,
        q_and_k: Discarded,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what attention reads: q, k and v, `[S/r, N/(t u), K]` each."""
        norm = Discarded(self._discards_norm)
        normed_S1D = norm.run(self._modulate, self.attention_norm, hidden_S1D, modulation1_R3D, local)
        heads = self.attention.heads(normed_S1D, layout, local, q_and_k)
        norm.until(heads[2])
        return heads

    def _above(
        self,
        hidden_S1D: torch.Tensor,
        out_SNK: torch.Tensor,
        modulation1_R3D: torch.Tensor,
        modulation2_R3D: torch.Tensor,
        local: LocalPack,
    ) -> torch.Tensor:
        """Return the tokens after this block from those before it and the attention."""
        selective, rows_S, norm2 = self.policy == "selective", local.modulation_rows, self.mlp_norm
        normed = Discarded(self._discards_norm)
        # fmt: off
        branch_S1D = self.attention.project(out_SNK)                                         # [S_local, 1, D]
        if self._discards_norm:
            gated = (hidden_S1D, branch_S1D, modulation1_R3D, rows_S)
            hidden_S1D = recompute(gated_residual, *gated) if selective else gated_residual(*gated)
            normed_S1D = normed.run(self._modulate, norm2, hidden_S1D, modulation2_R3D, local)
        else:
            hidden_S1D, normed_S1D = gated_residual_adaln(                                   # [S_local, 1, D] both
                hidden_S1D, branch_S1D, modulation1_R3D, norm2.weight, norm2.bias, modulation2_R3D, rows_S,
                eps=norm2.eps,
            )
        branch_S1D = self.mlp(normed_S1D, normed, discard_gelu=selective)                    # [S_local, 1, D]
        if selective:
            return recompute(gated_residual, hidden_S1D, branch_S1D, modulation2_R3D, rows_S)
        return gated_residual(hidden_S1D, branch_S1D, modulation2_R3D, rows_S)               # [S_local, 1, D]
        # fmt: on

    def _modulate(
        self, norm: nn.LayerNorm, hidden_S1D: torch.Tensor, modulation_R3D: torch.Tensor, local: LocalPack
    ) -> torch.Tensor:
        return adaln_modulate(hidden_S1D, norm.weight, norm.bias, modulation_R3D, local.modulation_rows, eps=norm.eps)
