"""Full attention inside each sample of a pack, nothing across samples (paper section 3.1, figure 6)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megacogvx_kernels.checks import (
    require_floating,
    require_one_device,
    require_one_dtype,
    require_shape,
    require_values,
    require_vectors,
)
from megacogvx_kernels.packed_attention.backends import BACKENDS, Packed, attend, missing
from megacogvx_kernels.packed_attention.choice import Choice, choose_backend

__all__ = ["BACKENDS", "Choice", "choose_backend", "missing", "packed_attention"]


def packed_attention(
    q_SNK: torch.Tensor,
    k_SNK: torch.Tensor,
    v_SNK: torch.Tensor,
    boundaries: Sequence[int],
    *,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Attend from every token to all tokens of its own sample; not causal, scale K^-0.5, no dropout.

    Args:
        q_SNK, k_SNK, v_SNK: `[S, N, K]`, all tokens of the pack, at least one; K is even.
        boundaries: first token of each real sample, then the end of the last one (host integers, so that no layer
            waits for the device). Tokens beyond the end are padding.
        cu_seqlens: `boundaries` as int32 tensor on the device of q; made once per pack by whoever has many layers,
            else made here where a kernel wants it.
        backend: one of `BACKENDS`, or "auto" (`choose_backend`).

    Returns:
        `[S, N, K]`; zeros for the padding, which neither reads nor is read.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or layout, the boundaries don't fit, or the
            backend can't be used; it is named.
    """
    tensors = {"q_SNK": q_SNK, "k_SNK": k_SNK, "v_SNK": v_SNK}
    _check_tensors(tensors)
    _check_boundaries(boundaries, q_SNK.shape[0])
    if cu_seqlens is not None:
        require_shape("cu_seqlens", cu_seqlens, (len(boundaries),))
        if cu_seqlens.dtype != torch.int32:
            raise TypeError(f"cu_seqlens must be int32, not {cu_seqlens.dtype}")
        require_one_device(q_SNK=q_SNK, cu_seqlens=cu_seqlens)
        require_values("cu_seqlens", cu_seqlens, boundaries)
    chosen = choose_backend(q_SNK, boundaries, backend).name
    if cu_seqlens is None:
        wanted = chosen not in ("reference", "cudnn")
        cu_seqlens = torch.tensor(boundaries, dtype=torch.int32, device=q_SNK.device if wanted else "cpu")
    return attend(chosen, (q_SNK, k_SNK, v_SNK), Packed(boundaries, cu_seqlens))


def _check_tensors(tensors: dict[str, torch.Tensor]) -> None:
    q_SNK = tensors["q_SNK"]
    require_floating("q_SNK", q_SNK)
    require_shape("q_SNK", q_SNK, (None, None, None))
    if not q_SNK.numel():
        raise ValueError(f"q_SNK has the shape {tuple(q_SNK.shape)}; S, N and K must be at least 1")
    if q_SNK.shape[-1] % 2:
        raise ValueError(f"q_SNK has heads of K={q_SNK.shape[-1]} channels; it must be an even number")
    for name, tensor in tensors.items():
        require_shape(name, tensor, tuple(q_SNK.shape))
        require_vectors(name, tensor)
    require_one_dtype(**tensors)
    require_one_device(**tensors)


def _check_boundaries(boundaries: Sequence[int], tokens: int) -> None:
    if not all(isinstance(place, int) for place in boundaries):
        raise TypeError(f"boundaries={tuple(boundaries)} must be integers")
    if len(boundaries) < 2:
        raise ValueError(f"boundaries={tuple(boundaries)} have no samples: they need 0 and at least one end")
    if boundaries[0] != 0 or list(boundaries) != sorted(boundaries):
        raise ValueError(f"boundaries={tuple(boundaries)} must start at 0 and not decrease")
    if boundaries[-1] > tokens:
        raise ValueError(f"boundaries end at {boundaries[-1]}, beyond the {tokens} tokens of q_SNK")
