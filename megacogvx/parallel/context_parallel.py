"""Tokens over the context ranks, and attention across them (DeepSpeed-Ulysses, Jacobs et al. 2023, section 3).

Each context rank holds consecutive tokens. For attention the ranks exchange heads for tokens, so that each sees whole
samples for its share of the heads, and any kernel for sequences of unequal length serves.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings


def tokens_to_heads(x_SNK: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Give up heads for tokens: from this rank's tokens of all heads to all tokens of this rank's heads.

    Args:
        x_SNK: `[S / ranks, N, K]`, rank r holding the r-th run of tokens; N divides by the ranks.
        group: the context ranks; with one rank nothing happens.

    Returns:
        `[S, N / ranks, K]`, rank r holding the r-th run of heads.

    Backward: `heads_to_tokens` of the gradient.
    """
    ranks = group.size()
    if ranks == 1:
        return x_SNK
    tokens, heads, width = x_SNK.shape
    assert heads % ranks == 0, f"{heads} heads over {ranks} context ranks"
    parts = x_SNK.reshape(tokens, ranks, heads // ranks, width).transpose(0, 1)
    received = mappings.all_to_all(group, parts.reshape(ranks * tokens, -1).contiguous())
    return received.reshape(ranks * tokens, heads // ranks, width)


def heads_to_tokens(x_SNK: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Give back tokens for heads: the inverse of `tokens_to_heads`.

    Args:
        x_SNK: `[S, N / ranks, K]`, rank r holding the r-th run of heads; S divides by the ranks.
        group: the context ranks; with one rank nothing happens.

    Returns:
        `[S / ranks, N, K]`, rank r holding the r-th run of tokens.

    Backward: `tokens_to_heads` of the gradient.
    """
    ranks = group.size()
    if ranks == 1:
        return x_SNK
    tokens, heads, width = x_SNK.shape
    assert tokens % ranks == 0, f"{tokens} tokens over {ranks} context ranks"
    received = mappings.all_to_all(group, x_SNK.reshape(tokens, heads * width).contiguous())
    parts = received.reshape(ranks, tokens // ranks, heads, width).transpose(0, 1)
    return parts.reshape(tokens // ranks, ranks * heads, width)
