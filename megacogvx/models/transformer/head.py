"""Tokens -> rows of patches: what stands above the last block in figure 3. The one place where tokens become rows."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig
from torch import nn

from megacogvx.models.transformer.config import CogVideoXConfig
from megacogvx.models.transformer.modulation import HeadModulation
from megacogvx.pack_layout import LocalPack
from megacogvx.parallel.groups import ParallelGroups
from megacogvx.parallel.sequence_parallel import sum_gradient_over_tensor_ranks
from megacogvx_kernels.adaln import adaln_modulate


class PackHead(nn.Module):
    """LayerNorm, AdaLN without a gate, linear; video tokens only."""

    def __init__(self, config: CogVideoXConfig, core: TransformerConfig, groups: ParallelGroups) -> None:
        super().__init__()
        dtype = core.params_dtype
        self.norm_final = nn.LayerNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.norm_out = nn.LayerNorm(config.hidden_size, config.final_norm_eps, dtype=dtype)
        self.modulation = HeadModulation(config, core, groups)
        self.proj = nn.Linear(config.hidden_size, config.row_size_out, dtype=dtype)
        sum_gradient_over_tensor_ranks(self.norm_final, self.norm_out, self.proj, core=core)

    def forward(self, hidden_S1D: torch.Tensor, condition_ME: torch.Tensor, local: LocalPack) -> torch.Tensor:
        """Return the velocity rows `[V_local, P]` of this rank's video tokens, in the order of `video_index`."""
        video_VD = self.norm_final(hidden_S1D[:, 0].index_select(0, local.video_index))
        modulation_M2D = self.modulation(condition_ME)
        return self.proj(self._modulate(video_VD, modulation_M2D, local.video_samples))

    def _modulate(self, video_VD: torch.Tensor, modulation_M2D: torch.Tensor, samples_V: torch.Tensor) -> torch.Tensor:
        """Return the modulated rows; of none, where a rank holds text or padding alone, none.

        The gradients of such a rank are zeros, and not missing: others wait for them where the table's are summed.
        """
        norm = self.norm_out
        if not len(samples_V):
            return norm(video_VD) + modulation_M2D[samples_V, 0]
        return adaln_modulate(video_VD, norm.weight, norm.bias, modulation_M2D, samples_V, eps=norm.eps)
