"""The plain definition of `packed_attention`: one scaled dot product attention per sample."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F


def packed_attention(
    q_SNK: torch.Tensor, k_SNK: torch.Tensor, v_SNK: torch.Tensor, boundaries: Sequence[int]
) -> torch.Tensor:
    """softmax(q k^T K^-0.5) v within each sample; see the public function for the arguments."""
    return torch.cat(of_each_sample(q_SNK, k_SNK, v_SNK, boundaries))


def of_each_sample(
    q_SNK: torch.Tensor, k_SNK: torch.Tensor, v_SNK: torch.Tensor, boundaries: Sequence[int]
) -> list[torch.Tensor]:
    """Return the attention of each sample that has tokens, then zeros for the padding."""
    parts = [
        _attend(q_SNK[start:stop], k_SNK[start:stop], v_SNK[start:stop])
        for start, stop in pairwise(boundaries)
        if stop > start
    ]
    return [*parts, torch.zeros_like(q_SNK[boundaries[-1] :])]


def _attend(q_SNK: torch.Tensor, k_SNK: torch.Tensor, v_SNK: torch.Tensor) -> torch.Tensor:
    q_1NSK, k_1NSK, v_1NSK = (x.transpose(0, 1)[None] for x in (q_SNK, k_SNK, v_SNK))
    return F.scaled_dot_product_attention(q_1NSK, k_1NSK, v_1NSK)[0].transpose(0, 1)
