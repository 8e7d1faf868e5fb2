"""`packed_attention` on the CPU: torch's flash attention for CPUs, one call for equal samples that follow each other.

Equal to `reference.packed_attention`, which is the definition, with one copy of the output less kept for the backward
pass, and without the zeros that the gradient of a slice is made of. The operators are those under torch's
`scaled_dot_product_attention` (`aten/src/ATen/native/transformers/attention.cpp` of torch 2.13).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import Any

import torch
from torch.autograd.function import once_differentiable

aten = torch.ops.aten
Run = tuple[slice, int]  # tokens of samples of one length, and how many samples they are


def packed_attention(
    q_SNK: torch.Tensor, k_SNK: torch.Tensor, v_SNK: torch.Tensor, boundaries: Sequence[int]
) -> torch.Tensor:
    """softmax(q k^T K^-0.5) v within each sample; see the public function for the arguments."""
    out: torch.Tensor = _PackedAttention.apply(q_SNK, k_SNK, v_SNK, tuple(runs_of_equal_samples(boundaries)))
    return out


def runs_of_equal_samples(boundaries: Sequence[int]) -> Iterator[Run]:
    """Yield the samples of a pack in runs of equal length; empty samples are left out."""
    samples = [(start, stop) for start, stop in pairwise(boundaries) if stop > start]
    for _, run in groupby(samples, key=lambda sample: sample[1] - sample[0]):
        members = list(run)
        yield slice(members[0][0], members[-1][1]), len(members)


class _PackedAttention(torch.autograd.Function):
    """Keeps q, k, v, the output and the log-sum-exp of each token and head.

    Backward: the gradients of q, k and v, `[S, N, K]` each; zeros for the padding.
    """

    @staticmethod
    def forward(
        ctx: Any, q_SNK: torch.Tensor, k_SNK: torch.Tensor, v_SNK: torch.Tensor, runs: tuple[Run, ...]
    ) -> torch.Tensor:
        tensors = [x if x.stride(-1) == 1 else x.contiguous() for x in (q_SNK, k_SNK, v_SNK)]
        parts, sums = [], []
        for run in runs:
            out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*(_batch(x, run) for x in tensors))
            parts.append(_tokens(out))
            sums.append(lse)
        out_SNK = _join(parts, q_SNK)
        ctx.save_for_backward(*tensors, out_SNK, *sums)
        ctx.runs = runs
        return out_SNK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SNK: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_SNK, k_SNK, v_SNK, out_SNK, *sums = ctx.saved_tensors
        parts: tuple[list[torch.Tensor], ...] = ([], [], [])
        for run, lse in zip(ctx.runs, sums, strict=True):
            tensors = (_batch(x, run) for x in (grad_SNK, q_SNK, k_SNK, v_SNK, out_SNK))
            found = aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, lse, 0.0, False)
            for list_of_parts, gradient in zip(parts, found, strict=True):
                list_of_parts.append(_tokens(gradient))
        return *(_join(list_of_parts, q_SNK) for list_of_parts in parts), None


def _batch(x_SNK: torch.Tensor, run: Run) -> torch.Tensor:
    """`[S, N, K]` -> `[samples, N, tokens of each, K]`, without a copy."""
    tokens, count = run
    return x_SNK[tokens].unflatten(0, (count, -1)).transpose(1, 2)


def _tokens(x: torch.Tensor) -> torch.Tensor:
    """`[samples, N, tokens of each, K]` -> `[S, N, K]`."""
    return x.transpose(1, 2).flatten(0, 1)


def _join(parts: list[torch.Tensor], like_SNK: torch.Tensor) -> torch.Tensor:
    """Put the runs after each other, zeros for the padding at the end; empties `parts`."""
    padding = len(like_SNK) - sum(map(len, parts))
    if padding or not parts:
        parts.append(like_SNK.new_zeros(padding, *like_SNK.shape[1:]))
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    parts.clear()
    return joined
