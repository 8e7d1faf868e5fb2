"""`causal_halo` for a clip whose frames lie on several ranks: the exchange between neighbours, and its gradient.

Each rank hands the next one the last `size` frames of what it sees itself, its own halo included, as a chunk does
with the next chunk. So a halo that spans several ranks passes through those between, nobody needs to know how many
frames another rank holds, and every boundary carries `size` frames, once forward and once backward.

The exchange has two halves, so that the caller can compute between them whatever needs no halo:

    forward    start: post the messages          (interior frames)    wait: the halo is there
    backward   wait: post the halo's gradient    (interior frames)    start: add what came back to its owner's frames

Autograd runs nodes in the reverse order of their making, which gives the second line. On a GPU the messages travel on
other streams than the current one, on which the interior frames are computed (`messages.py`, `peer_memory.py`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megacogvx_kernels.causal_halo.frames import add_to_last_frames, as_sent, last_frames, layout_of
from megacogvx_kernels.causal_halo.messages import Messages
from megacogvx_kernels.causal_halo.peer_memory import PeerMemory, mailbox_of


class HaloExchange:
    """One exchange under way: `start_halo` makes it, `wait` ends it; the gradient comes back the same way."""

    def __init__(self, x_BCTHW: torch.Tensor, size: int, group: dist.ProcessGroup) -> None:
        """Post the messages; the frames that are sent may be overwritten only after `wait`."""
        self.size, self.group, self.rank = size, group, group.rank()
        self.is_first, self.is_last = self.rank == 0, self.rank == group.size() - 1
        self.own = min(size, x_BCTHW.shape[2])  # how many of the last `size` frames that this rank sees are its own
        self.token: torch.Tensor | None = _Start.apply(x_BCTHW, self)

    def wait(self) -> torch.Tensor:
        """Return the frames before this rank's first one, `[B, C, size, H, W]`; call it once.

        Backward: posts the gradient on its way to the rank before.
        """
        assert self.token is not None, "an exchange is waited for once"
        token, self.token = self.token, None  # its node holds this object: a cycle that nobody would collect
        halo_BCTHW: torch.Tensor = _Wait.apply(token, self)
        return halo_BCTHW

    # What the two autograd nodes do, forward and then backward.

    def _begin(self, x_BCTHW: torch.Tensor) -> None:
        self.tail, self.layout = x_BCTHW[:, :, x_BCTHW.shape[2] - self.own :], layout_of(x_BCTHW)
        first = x_BCTHW[:, :, :1].expand(-1, -1, self.size, -1, -1)
        self.halo = torch.empty(first.shape, dtype=first.dtype, device=first.device, memory_format=self.layout)
        self.transport = transport_of(self.halo, self.group)
        if self.is_first:
            self.halo.copy_(first)
        self.can_send = self.own == self.size or self.is_first
        self._post(send=self._outgoing() if self.can_send else None, to=1, receive=None if self.is_first else self.halo)

    def _end(self) -> torch.Tensor:
        self._finish()
        if not self.can_send:
            self._post(send=self._outgoing(), to=1, receive=None)
            self._finish()
        halo = self.halo
        del self.halo, self.tail
        return halo

    def _begin_backward(self, gradient_BCTHW: torch.Tensor) -> None:
        self.halo_gradient = gradient_BCTHW.clone(memory_format=self.layout)
        self.tail_gradient = None if self.is_last else torch.empty_like(self.halo_gradient)
        outgoing = None if self.is_first else self.halo_gradient
        if self.own == self.size:
            self._post(send=outgoing, to=-1, receive=self.tail_gradient)
            return
        self._post(send=None, to=-1, receive=self.tail_gradient)
        self._finish()
        if self.tail_gradient is not None:  # its first frames belong to ranks further ahead
            self.halo_gradient[:, :, self.own :] += self.tail_gradient[:, :, : self.size - self.own]
        self._post(send=outgoing, to=-1, receive=None)

    def _end_backward(self, shape: torch.Size) -> torch.Tensor:
        self._finish()
        gradient = torch.zeros_like(self.halo_gradient[:, :, :1].expand(shape), memory_format=self.layout)
        if self.tail_gradient is not None:
            add_to_last_frames(gradient, self.tail_gradient[:, :, self.size - self.own :])
        if self.is_first:
            gradient[:, :, 0] += self.halo_gradient.sum(dim=2)
        del self.halo_gradient, self.tail_gradient
        return gradient

    def _outgoing(self) -> torch.Tensor | None:
        """Return the last `size` frames of [halo, x], or None on the last rank."""
        if self.is_last:
            return None
        if self.own == self.size:
            return last_frames(self.tail, self.layout)
        return torch.cat([self.halo[:, :, self.own :], self.tail], dim=2).contiguous(memory_format=self.layout)

    def _post(self, send: torch.Tensor | None, to: int, receive: torch.Tensor | None) -> None:
        """Send to the neighbour at `to` (-1 or 1) and receive from the other one; None is no message."""
        send, receive = (None if x is None else as_sent(x, self.layout) for x in (send, receive))
        self.transport.post(send, to, receive)

    def _finish(self) -> None:
        """Wait for what was posted."""
        self.transport.finish()


def transport_of(message: torch.Tensor, group: dist.ProcessGroup) -> Messages | PeerMemory:
    """Return what carries messages of this size: the memory of the neighbours, inside a node, else messages.

    Every rank of the group makes this call; the first one of a size may communicate.
    """
    mailbox = mailbox_of(group, message.numel() * message.element_size(), message.device)
    return Messages(group) if mailbox is None else PeerMemory(mailbox)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BCTHW: torch.Tensor, exchange: HaloExchange) -> torch.Tensor:
        ctx.exchange, ctx.shape = exchange, x_BCTHW.shape
        exchange._begin(x_BCTHW)
        return x_BCTHW.new_zeros(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.exchange._end_backward(ctx.shape), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: torch.Tensor, exchange: HaloExchange) -> torch.Tensor:
        ctx.exchange = exchange
        return exchange._end()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.exchange._begin_backward(gradients[0])
        return gradients[0].new_zeros(1), None
