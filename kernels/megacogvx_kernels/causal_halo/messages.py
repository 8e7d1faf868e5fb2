"""How a rank's frames reach its neighbours: point to point, over whatever backend the process group has.

NCCL moves them on a stream of its own, which waits for the current one when they are posted; the current stream waits
for it in `finish` alone. So what is computed between the two runs beside the transfer.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


class Messages:
    """The messages of one exchange."""

    name = "messages"

    def __init__(self, group: dist.ProcessGroup) -> None:
        """Take the ranks that exchange."""
        self.group = group
        self.works: list[dist.Work] = []
        self.in_flight: list[torch.Tensor] = []  # keeps the tensors of the messages alive

    def post(self, send: torch.Tensor | None, to: int, receive: torch.Tensor | None) -> None:
        """Send to the neighbour at `to` (-1 or 1), receive from the other one; both contiguous, None is no message."""
        rank = self.group.rank()
        wanted = [(dist.irecv, receive, rank - to), (dist.isend, send, rank + to)]
        ops = [dist.P2POp(call, x, group=self.group, group_peer=peer) for call, x, peer in wanted if x is not None]
        if ops:
            self.in_flight += [op.tensor for op in ops]
            self.works += dist.batch_isend_irecv(ops)

    def finish(self) -> None:
        """Wait until what was posted has arrived, and may be overwritten where it came from."""
        for work in self.works:
            work.wait()
        self.works, self.in_flight = [], []
