"""Full attention inside each sample of a pack, nothing across samples (paper section 3.1, figure 6)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megacogvx_kernels.checks import require_floating, require_shape
from megacogvx_kernels.packed_attention import reference

__all__ = ["packed_attention"]


def packed_attention(
    q_SNK: torch.Tensor, k_SNK: torch.Tensor, v_SNK: torch.Tensor, boundaries: Sequence[int]
) -> torch.Tensor:
    """Attend from every token to all tokens of its own sample; not causal, scale K^-0.5, no dropout.

    Args:
        q_SNK, k_SNK, v_SNK: `[S, N, K]`, all tokens of the pack.
        boundaries: first token of each real sample, then the end of the last one (host integers, so that no layer
            waits for the device). Tokens beyond the end are padding.

    Returns:
        `[S, N, K]`; zeros for the padding, which neither reads nor is read.

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape, or the boundaries don't fit; it is named.
    """
    require_floating("q_SNK", q_SNK)
    require_shape("q_SNK", q_SNK, (None, None, None))
    require_shape("k_SNK", k_SNK, tuple(q_SNK.shape))
    require_shape("v_SNK", v_SNK, tuple(q_SNK.shape))
    if not boundaries or boundaries[0] != 0 or list(boundaries) != sorted(boundaries):
        raise ValueError(f"boundaries={tuple(boundaries)} must start at 0 and not decrease")
    if boundaries[-1] > q_SNK.shape[0]:
        raise ValueError(f"boundaries end at {boundaries[-1]}, beyond the {q_SNK.shape[0]} tokens of q_SNK")
    return reference.packed_attention(q_SNK, k_SNK, v_SNK, boundaries)
