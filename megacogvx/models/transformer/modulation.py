"""Expert adaptive LayerNorm's tables: one condition per sample -> shift, scale and gate for its text and its video.

Paper section 2.2: the two modalities share every weight of a block but these ("expert adaptive layernorm").
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

from megacogvx.models.transformer.config import CogVideoXConfig
from megacogvx.parallel.groups import ParallelGroups
from megacogvx.parallel.tensor_parallel import ModulationLinear


class ExpertModulation(ModulationLinear):
    """Condition `[M, time_embed_dim]` -> table `[M * 2, 3, D]`: (video, text) of a sample x (shift, scale, gate)."""

    def __init__(self, config: CogVideoXConfig, core: TransformerConfig, groups: ParallelGroups) -> None:
        super().__init__(config.time_embed_dim, 6 * config.hidden_size, core, groups)
        self.hidden_size = config.hidden_size

    def forward(self, condition_ME: torch.Tensor) -> torch.Tensor:
        """Return the table: row 2 m is the video of sample m, row 2 m + 1 its text."""
        return super().forward(F.silu(condition_ME)).reshape(-1, 3, self.hidden_size)


class HeadModulation(ModulationLinear):
    """Condition `[M, time_embed_dim]` -> table `[M, 2, D]`: (shift, scale) of each sample's video."""

    def __init__(self, config: CogVideoXConfig, core: TransformerConfig, groups: ParallelGroups) -> None:
        super().__init__(config.time_embed_dim, 2 * config.hidden_size, core, groups)
        self.hidden_size = config.hidden_size

    def forward(self, condition_ME: torch.Tensor) -> torch.Tensor:
        """Return the table: row m is sample m."""
        return super().forward(F.silu(condition_ME)).reshape(-1, 2, self.hidden_size)
