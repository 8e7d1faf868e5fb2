"""How a rank's frames reach its neighbours inside a node: written straight into their memory, over NVLink or PCIe.

Each rank has a mailbox that its neighbours can write to: torch's symmetric memory, which hands allocations around
between the processes of a node (`torch.distributed._symmetric_memory` of torch 2.11 to 2.13, `empty`, `rendezvous`;
`torch/csrc/distributed/c10d/symm_mem/CUDASymmetricMemory.cu`, `get_buffer`, `put_signal`, `wait_signal`). A copy engine
carries the frames, so no multiprocessor is taken from the convolution that runs meanwhile; two more streams wait for
signals, not the current one.

A direction (to the next rank; to the one before) has two slots, used in turn. Of a slot:

    sender      (wait until it was read)   copy the frames into it   signal: it is full
    receiver     wait until it is full     copy the frames out       signal: it was read

A signal is set from 0 to 1 and taken from 1 to 0 (`try_put_signal`, `try_wait_signal`), both on the device.
"""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

SLOTS, DIRECTIONS = 2, 2
CHANNELS = 2 * SLOTS * DIRECTIONS  # "full" and "was read" of each slot
SIGNAL_BYTES = 4
SMALLEST = 2**20  # bytes of a slot
TIMEOUT_MS = 10 * 60 * 1000  # then a neighbour counts as gone, and the waiting kernel ends this process with an error
TEXT_BYTES = 256  # of what ranks tell each other before they have a mailbox
BOOT = Path("/proc/sys/kernel/random/boot_id")  # tells machines of one name apart

_log = logging.getLogger("megacogvx.kernels")
_mailboxes: WeakKeyDictionary[dist.ProcessGroup, Mailbox | None] = WeakKeyDictionary()  # None: this group has none


class Mailbox:
    """The memory of one process group: each rank's slots, and how many messages went through them."""

    def __init__(self, group: dist.ProcessGroup, capacity: int, device: torch.device) -> None:
        """Allocate and exchange handles; every rank of the group makes this call.

        Args:
            group: the ranks, all of one node.
            capacity: bytes of a slot.
            device: of this rank.

        Raises:
            RuntimeError: the devices can't reach each other's memory.
        """
        self.rank, self.capacity = group.rank(), capacity
        memory = _symmetric_memory()
        self.memory = memory.empty(DIRECTIONS * SLOTS * capacity, dtype=torch.uint8, device=device)
        self.handle = memory.rendezvous(self.memory, group)
        self.sent, self.received = [0] * DIRECTIONS, [0] * DIRECTIONS
        on_gpu = device.type == "cuda"
        self.outward, self.inward = (torch.cuda.Stream(device) if on_gpu else None for _ in range(2))

    def send(self, message: torch.Tensor, to: int) -> None:
        """Write a contiguous message into the memory of the neighbour at `to` (-1 or 1)."""
        count, slot, first = self._next(self.sent, to)
        _follow(self.outward)
        with torch.cuda.stream(self.outward):
            if count >= SLOTS:
                self.handle.wait_signal(self.rank + to, CHANNELS // 2 + slot, TIMEOUT_MS)
            raw = _bytes_of(message)
            self.handle.get_buffer(self.rank + to, (raw.numel(),), torch.uint8, first).copy_(raw)
            self.handle.put_signal(self.rank + to, slot, TIMEOUT_MS)

    def receive(self, message: torch.Tensor, to: int) -> None:
        """Read a contiguous message of the neighbour opposite to `to` out of this rank's memory."""
        _, slot, first = self._next(self.received, to)
        _follow(self.inward)
        with torch.cuda.stream(self.inward):
            self.handle.wait_signal(self.rank - to, slot, TIMEOUT_MS)
            raw = _bytes_of(message)
            raw.copy_(self.memory[first : first + raw.numel()])
            self.handle.put_signal(self.rank - to, CHANNELS // 2 + slot, TIMEOUT_MS)

    def finish(self) -> None:
        """Let the current stream wait for what was sent and received."""
        for stream in (self.outward, self.inward):
            if stream is not None:
                torch.cuda.current_stream(stream.device).wait_stream(stream)

    def _next(self, counts: list[int], to: int) -> tuple[int, int, int]:
        """Return how many messages came before, and slot and first byte of the next one."""
        direction = 0 if to == 1 else 1
        count = counts[direction]
        counts[direction] += 1
        slot = direction * SLOTS + count % SLOTS
        return count, slot, slot * self.capacity


class PeerMemory:
    """The messages of one exchange, through a mailbox; the same calls as `Messages`."""

    name = "peer memory"

    def __init__(self, mailbox: Mailbox) -> None:
        """Take the group's mailbox."""
        self.mailbox = mailbox
        self.in_flight: list[torch.Tensor] = []  # other streams use them until `finish`

    def post(self, send: torch.Tensor | None, to: int, receive: torch.Tensor | None) -> None:
        """Send to the neighbour at `to` (-1 or 1), receive from the other one; both contiguous, None is no message."""
        self.in_flight += [x for x in (send, receive) if x is not None]
        if send is not None:
            self.mailbox.send(send, to)
        if receive is not None:
            self.mailbox.receive(receive, to)

    def finish(self) -> None:
        """Let the current stream wait until what was posted has arrived, and has left where it came from."""
        self.mailbox.finish()
        self.in_flight = []


def mailbox_of(group: dist.ProcessGroup, message_bytes: int, device: torch.device) -> Mailbox | None:
    """Return the group's mailbox with slots of at least `message_bytes`, or None if it can't have one.

    Every rank of the group makes this call, with the same size. The first one, and one that needs larger slots,
    communicates; the others look the answer up.
    """
    if device.type != "cuda":
        return None
    found = _mailboxes.get(group)
    if group in _mailboxes and (found is None or found.capacity >= message_bytes):
        return found
    if found is None and (problem := _problem(group, device)):
        _log.info("causal_halo over %d ranks: messages, since %s", group.size(), problem)
        _mailboxes[group] = None
        return None
    torch.cuda.synchronize(device)  # nothing of ours is on its way into a neighbour's old mailbox any more
    _mailboxes[group] = _make(group, max(SMALLEST, 1 << (message_bytes - 1).bit_length()), device)
    return _mailboxes[group]


def _make(group: dist.ProcessGroup, capacity: int, device: torch.device) -> Mailbox | None:
    """Make a mailbox on every rank, or on none."""
    try:
        mailbox, problem = Mailbox(group, capacity, device), ""
    except (RuntimeError, NotImplementedError) as error:
        mailbox, problem = None, f"{type(error).__name__} {error}"
    problems = [each for each in _gather(problem, group, device) if each]
    if problems:
        _log.warning("causal_halo over %d ranks: messages, since peer memory failed: %s", group.size(), problems[0])
        return None
    _log.info("causal_halo over %d ranks: peer memory, slots of %d bytes", group.size(), capacity)
    return mailbox


def _problem(group: dist.ProcessGroup, device: torch.device) -> str:
    """Return why the ranks of a group can't have a mailbox, the same on every rank; "" if they may."""
    machines = _gather(_machine(), group, device)
    if len(set(machines)) > 1:
        return f"they are on {len(set(machines))} machines"
    return next((problem for problem in _gather(_local_problem(group), group, device) if problem), "")


def _local_problem(group: dist.ProcessGroup) -> str:
    try:
        memory = _symmetric_memory()
    except ImportError as error:
        return f"torch {torch.__version__} has no symmetric memory: {error}"
    needed, size = CHANNELS * group.size() * SIGNAL_BYTES, memory.get_signal_pad_size()
    return "" if needed <= size else f"{needed} bytes of signals are more than the {size} of torch's symmetric memory"


def _machine() -> str:
    return f"{socket.gethostname()} {BOOT.read_text().strip() if BOOT.is_file() else ''}"


def _gather(text: str, group: dist.ProcessGroup, device: torch.device) -> list[str]:
    """Return every rank's text, its first bytes."""
    place = torch.device("cpu") if "gloo" in dist.get_backend(group) else device
    raw = text.encode()[:TEXT_BYTES].ljust(TEXT_BYTES)
    mine = torch.tensor(list(raw), dtype=torch.uint8, device=place)
    every = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(every, mine, group=group)
    return [bytes(each.tolist()).decode(errors="ignore").rstrip() for each in every]


def _symmetric_memory() -> Any:
    import torch.distributed._symmetric_memory as symmetric_memory

    return symmetric_memory


def _bytes_of(message: torch.Tensor) -> torch.Tensor:
    return message.view(-1).view(torch.uint8)


def _follow(stream: torch.cuda.Stream | None) -> None:
    """Let `stream` begin where the current one is; None, on the CPU: calls are done when they return."""
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(stream.device))
