"""The feed-forward half of a block."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import nn

from megacogvx.models.transformer.config import CogVideoXConfig
from megacogvx.parallel.groups import ParallelGroups
from megacogvx.parallel.recompute import Discarded
from megacogvx.parallel.tensor_parallel import GeluRowLinear, column_linear, row_linear


class MLP(nn.Module):
    """D -> 4 D -> D with the tanh form of GELU; both modalities share it.

    Every recompute policy computes GELU again in the backward pass: it costs no matrix product, and its output would be
    the widest thing that a block keeps. Transformer Engine's layers, which keep what they multiply, leave it to the
    policy.

    Args:
        config, core, groups: as of the block.
        keep_gelu: not where the whole MLP is computed again: once is enough.
    """

    def __init__(
        self, config: CogVideoXConfig, core: TransformerConfig, groups: ParallelGroups, keep_gelu: bool = False
    ) -> None:
        super().__init__()
        self.fc1 = column_linear(config.hidden_size, config.ffn_hidden_size, core, groups)
        self.fc2 = row_linear(config.ffn_hidden_size, config.hidden_size, core, groups, GeluRowLinear)
        if isinstance(self.fc2, GeluRowLinear):
            self.fc2.keep_gelu = keep_gelu

    def forward(
        self, hidden_S1D: torch.Tensor, discarded: Discarded | None = None, discard_gelu: bool = False
    ) -> torch.Tensor:
        """Return `[S_local, 1, D]`.

        Args:
            hidden_S1D: `[S_local, 1, D]`.
            discarded: made `hidden_S1D`, which is made again once GELU's gradient, the widest time of all, is over.
            discard_gelu: Transformer Engine's layers, too, shall have GELU computed again.
        """
        inner_S1F = self.fc1(hidden_S1D)
        if discarded is not None:
            discarded.until(inner_S1F)
        if isinstance(self.fc2, GeluRowLinear):
            return self.fc2(inner_S1F)
        gelu = Discarded(discard_gelu)
        out_S1D = self.fc2(gelu.run(partial(F.gelu, approximate="tanh"), inner_S1F))
        gelu.until(out_S1D)
        return out_S1D
