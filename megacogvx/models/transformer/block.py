"""One block of the expert transformer (paper figure 3)."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig
from torch import nn

from megacogvx.models.transformer.attention import JointAttention
from megacogvx.models.transformer.config import CogVideoXConfig
from megacogvx.models.transformer.mlp import MLP
from megacogvx.models.transformer.modulation import ExpertModulation
from megacogvx.pack_layout import LocalPack, PackLayout
from megacogvx.parallel.groups import ParallelGroups
from megacogvx.parallel.sequence_parallel import sum_gradient_over_tensor_ranks
from megacogvx_kernels.adaln import adaln_modulate, gated_residual, gated_residual_adaln


class CogVideoXBlock(nn.Module):
    """Attention, then MLP, each between an expert AdaLN and a gated residual.

    Text and video are one tensor; only the modulation (by `rows`) and the rotation (inside attention) tell them
    apart.
    """

    def __init__(self, config: CogVideoXConfig, core: TransformerConfig, groups: ParallelGroups) -> None:
        super().__init__()
        dtype = core.params_dtype
        self.attention_modulation = ExpertModulation(config, core, groups)
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.attention = JointAttention(config, core, groups)
        self.mlp_modulation = ExpertModulation(config, core, groups)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.mlp = MLP(config, core, groups)
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
        rows_S, norm1, norm2 = local.modulation_rows, self.attention_norm, self.mlp_norm
        # fmt: off
        modulation1_R3D = self.attention_modulation(condition_ME)                            # [2 M, 3, D]
        modulation2_R3D = self.mlp_modulation(condition_ME)                                  # [2 M, 3, D]

        normed_S1D = adaln_modulate(                                                         # [S_local, 1, D]
            hidden_S1D, norm1.weight, norm1.bias, modulation1_R3D, rows_S, eps=norm1.eps
        )
        branch_S1D = self.attention(normed_S1D, layout, local)                               # [S_local, 1, D]
        hidden_S1D, normed_S1D = gated_residual_adaln(                                       # [S_local, 1, D] both
            hidden_S1D, branch_S1D, modulation1_R3D, norm2.weight, norm2.bias, modulation2_R3D, rows_S, eps=norm2.eps
        )
        branch_S1D = self.mlp(normed_S1D)                                                    # [S_local, 1, D]
        return gated_residual(hidden_S1D, branch_S1D, modulation2_R3D, rows_S)               # [S_local, 1, D]
        # fmt: on
