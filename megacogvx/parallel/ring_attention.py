"""Attention across ranks that hold other tokens of the same heads (Liu et al. 2023, ring attention), over packs.

The ranks of a ring hold consecutive runs of a pack's tokens. Attention stays inside a sample, and of all samples at
most one reaches from one run into another, so a pair of ranks exchanges one stretch of keys and values or nothing at
all. At distance 1, 2, ... each rank sends its stretch straight to whoever needs it, while it computes with the one that
it got before. The backward pass sends the keys and values again, and their gradients back to where they live.
Nothing larger than a run of tokens is ever held, and sums are made in the same order every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megacogvx_kernels.packed_attention.block import attend_block, attend_block_backward


def ring_attention(
    q_SNK: torch.Tensor,
    k_SNK: torch.Tensor,
    v_SNK: torch.Tensor,
    boundaries: Sequence[int],
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """Attend from this rank's tokens to all tokens of their samples, wherever in the ring they are.

    Args:
        q_SNK, k_SNK, v_SNK: `[S / ranks, N, K]`, rank r of the ring holding the r-th run of tokens.
        boundaries: first token of each real sample in the whole pack, then the end of the last one (host integers).
        group: the ring.

    Returns:
        `[S / ranks, N, K]`; zeros for the padding. Equal to `packed_attention` of the whole pack, cut; parts are merged
        in fp32.

    Backward: each rank gets the gradient of its tokens, with what the other ranks' queries contribute to k and v.
    """
    out: torch.Tensor = _RingAttention.apply(q_SNK, k_SNK, v_SNK, tuple(boundaries), group)
    return out


def shared_rows(boundaries: Sequence[int], share: int, owner: int, reader: int) -> range:
    """Return which of the owner's tokens the reader's tokens attend to, counted from the owner's first.

    The same with owner and reader exchanged gives the reader's tokens that attend to them.

    Args:
        boundaries: of the samples in the pack; beyond the last is padding.
        share: tokens of each rank.
        owner, reader: two different ranks of the ring.
    """
    assert owner != reader, f"rank {owner} shares nothing with itself"
    edge = max(owner, reader) * share  # the sample that reaches from one to the other holds this token ...
    before = min(owner, reader) * share + share - 1  # ... and this one
    for start, stop in pairwise(boundaries):
        if start <= before and edge < stop:
            first = owner * share
            return range(max(start, first) - first, min(stop, first + share) - first)
    return range(0)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_SNK: torch.Tensor,
        k_SNK: torch.Tensor,
        v_SNK: torch.Tensor,
        boundaries: tuple[int, ...],
        group: dist.ProcessGroup,
    ) -> torch.Tensor:
        ring = _Ring(boundaries, len(q_SNK), group)
        exchange = ring.send_keys(k_SNK, v_SNK, 1)
        out = torch.zeros(q_SNK.shape, dtype=torch.float32, device=q_SNK.device)
        lse = out.new_full(q_SNK.shape[:2], -torch.inf)
        for own in ring.own_samples():
            out[own], lse[own] = attend_block(q_SNK[own], k_SNK[own], v_SNK[own])
        for distance in range(1, ring.ranks):
            keys = exchange.received()
            if distance + 1 < ring.ranks:
                exchange = ring.send_keys(k_SNK, v_SNK, distance + 1)
            if keys is not None:
                rows = ring.readers(distance)
                _merge(out, lse, rows, *attend_block(q_SNK[rows], *keys))
        out = out.to(q_SNK.dtype)
        ctx.save_for_backward(q_SNK, k_SNK, v_SNK, out, lse)
        ctx.ring = ring
        return out

    @staticmethod
    def backward(ctx: Any, grad_SNK: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_SNK, k_SNK, v_SNK, out, lse = ctx.saved_tensors
        ring: _Ring = ctx.ring
        grad_SNK = grad_SNK.contiguous()
        exchange = ring.send_keys(k_SNK, v_SNK, 1)
        dq, dk, dv = (torch.zeros(q_SNK.shape, dtype=torch.float32, device=q_SNK.device) for _ in range(3))

        def gradients(rows: slice, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return attend_block_backward(grad_SNK[rows], q_SNK[rows], k, v, out[rows], lse[rows])

        for own in ring.own_samples():
            dq[own], dk[own], dv[own] = gradients(own, k_SNK[own], v_SNK[own])
        for distance in range(1, ring.ranks):
            keys = exchange.received()
            if distance + 1 < ring.ranks:
                exchange = ring.send_keys(k_SNK, v_SNK, distance + 1)
            back = None
            if keys is not None:
                rows = ring.readers(distance)
                dq_part, *back = gradients(rows, *keys)
                dq[rows] += dq_part
            returned = ring.send_gradients(back, q_SNK, distance).received()
            if returned is not None:
                lent = ring.lent(distance)
                dk[lent] += returned[0]
                dv[lent] += returned[1]
        return dq.to(q_SNK.dtype), dk.to(k_SNK.dtype), dv.to(v_SNK.dtype), None, None


class _Ring:
    """Who exchanges what with whom: at each distance this rank lends keys to one rank and borrows from another."""

    def __init__(self, boundaries: tuple[int, ...], share: int, group: dist.ProcessGroup) -> None:
        self.boundaries, self.share, self.group = boundaries, share, group
        self.rank, self.ranks = group.rank(), group.size()

    def own_samples(self) -> list[slice]:
        """Return this rank's part of each sample, as its own rows."""
        first, last = self.rank * self.share, (self.rank + 1) * self.share
        parts = ((max(start, first) - first, min(stop, last) - first) for start, stop in pairwise(self.boundaries))
        return [slice(start, stop) for start, stop in parts if start < stop]

    def readers(self, distance: int) -> slice:
        """Return this rank's queries that attend to the keys of the rank `distance` before it."""
        return self._rows(self.rank, self._lender(distance))

    def lent(self, distance: int) -> slice:
        """Return this rank's keys that queries of the rank `distance` after it attend to."""
        return self._rows(self.rank, self._borrower(distance))

    def send_keys(self, k_SNK: torch.Tensor, v_SNK: torch.Tensor, distance: int) -> _Exchange:
        """Start to send this rank's keys and values `distance` on, and to receive those from `distance` back."""
        lent, lender = self.lent(distance), self._lender(distance)
        wanted = self._rows(lender, self.rank)
        message = torch.stack([k_SNK[lent], v_SNK[lent]])
        return _Exchange(message, self._borrower(distance), _room(k_SNK, wanted), lender, self.group)

    def send_gradients(self, back: list[torch.Tensor] | None, like: torch.Tensor, distance: int) -> _Exchange:
        """Start to return the gradients of the keys and values that were borrowed at `distance`."""
        message = _room(like, slice(0, 0)) if back is None else torch.stack(back)
        room = _room(like, self.lent(distance))
        return _Exchange(message, self._lender(distance), room, self._borrower(distance), self.group)

    def _rows(self, owner: int, reader: int) -> slice:
        rows = shared_rows(self.boundaries, self.share, owner, reader)
        return slice(rows.start, rows.stop)

    def _borrower(self, distance: int) -> int:
        return (self.rank + distance) % self.ranks

    def _lender(self, distance: int) -> int:
        return (self.rank - distance) % self.ranks


class _Exchange:
    """One message to a rank of the ring and one from a rank, under way; an empty one isn't sent.

    Both ends know from the pack's boundaries whether there is one. Sending never waits for the other side, so the order
    in which ranks come here can't lock them.
    """

    def __init__(
        self, message: torch.Tensor, to: int, room: torch.Tensor, source: int, group: dist.ProcessGroup
    ) -> None:
        self.message, self.room = message, room  # kept until they are through
        operations = []
        if message.numel():
            operations.append(dist.P2POp(dist.isend, message, group=group, group_peer=to))
        if room.numel():
            operations.append(dist.P2POp(dist.irecv, room, group=group, group_peer=source))
        self.works = dist.batch_isend_irecv(operations) if operations else []

    def received(self) -> torch.Tensor | None:
        """Wait for both (on a GPU the stream waits, not the host); return what came, None if nothing was due."""
        for work in self.works:
            work.wait()
        return self.room if self.room.numel() else None


def _room(like: torch.Tensor, rows: slice) -> torch.Tensor:
    return like.new_empty(2, rows.stop - rows.start, *like.shape[1:])


def _merge(out: torch.Tensor, lse: torch.Tensor, rows: slice, out_part: torch.Tensor, lse_part: torch.Tensor) -> None:
    """Take one more part into `out` and `lse`, both fp32, in place."""
    both = torch.logaddexp(lse[rows], lse_part)
    # 1 / (1 + e^-x) of the difference of two logs of sums is the share of the first sum in both.
    share = F.sigmoid(lse_part - lse[rows])[..., None]
    out[rows] = torch.lerp(out[rows], out_part.float(), share)
    lse[rows] = both
