"""`causal_halo` through the neighbours' memory: with files in place of it the exchange equals one process with all."""

import time

import pytest
import torch
import torch.nn.functional as F

from megacogvx import draws
from megacogvx.testing.spawn import on_ranks
from megacogvx.testing.tolerance import assert_close
from megacogvx_kernels.causal_halo import causal_halo, exchange, peer_memory, start_halo
from megacogvx_kernels.causal_halo.messages import Messages

CPU = torch.device("cpu")
SECONDS = 20.0  # a signal that takes longer never comes


class Files:
    """torch's symmetric memory as the mailbox calls it, with files that all ranks map in place of GPU memory.

    What `CUDASymmetricMemory` does with a signal is in the module's docstring: set from 0 to 1, taken from 1 to 0.
    """

    def __init__(self, folder, rank):
        self.folder, self.rank, self.group, self.made = folder, rank, None, 0

    def empty(self, size, *, dtype, device):
        assert dtype == torch.uint8
        return self._map(self.rank, "memory", size)

    def rendezvous(self, tensor, group):
        from torch.distributed import barrier

        self.size, self.group = tensor.numel(), group
        self.signals = {rank: self._map(rank, "signals", 9216) for rank in range(group.size())}
        self.buffers = {rank: self._map(rank, "memory", self.size) for rank in range(group.size())}
        self.made += 1
        barrier(group=group)
        return self

    def get_signal_pad_size(self):
        return 9216

    def get_buffer(self, rank, sizes, dtype, storage_offset):
        assert dtype == torch.uint8
        return self.buffers[rank][storage_offset : storage_offset + sizes[0]]

    def put_signal(self, dst_rank, channel, timeout_ms):
        self._change(self.signals[dst_rank], self.group.size() * channel + self.rank, 0, 1)

    def wait_signal(self, src_rank, channel, timeout_ms):
        self._change(self.signals[self.rank], self.group.size() * channel + src_rank, 1, 0)

    def _map(self, rank, kind, size):
        return torch.from_file(
            str(self.folder / f"{kind}-{rank}-{self.made}"), shared=True, size=size, dtype=torch.uint8
        )

    def _change(self, signals, place, before, after):
        end = time.monotonic() + SECONDS
        while int(signals[place]) != before:
            assert time.monotonic() < end, f"rank {self.rank}: signal {place} is never {before}"
            time.sleep(0.0002)
        signals[place] = after


def _through_files(monkeypatch, folder, group, capacity):
    memory = Files(folder, group.rank())
    monkeypatch.setattr(peer_memory, "_symmetric_memory", lambda: memory)
    boxes = {}

    def transport(message, of):
        size = message.numel() * message.element_size()
        if not boxes or boxes[0].capacity < size:
            boxes[0] = peer_memory.Mailbox(of, max(capacity, size), CPU)
        return peer_memory.PeerMemory(boxes[0])

    monkeypatch.setattr(exchange, "transport_of", transport)
    return boxes


def _cut(x, counts, rank):
    start = sum(counts[:rank])
    return x[:, :, start : start + counts[rank]]


def _stack(x, weights, halo):
    """As a model does it: the interior between the two halves of the exchange."""
    for weight in weights:
        x = halo(x, weight).tanh()
    return x


def _whole(x, weight):
    return F.conv3d(causal_halo(x, weight.shape[2] - 1), weight, padding=(0, 1, 1))


def test_the_directions_and_neighbouring_messages_share_no_slot():
    """A backward message may arrive before its receiver has read the last forward one: seldom enough to go unseen."""
    box = object.__new__(peer_memory.Mailbox)
    box.capacity = 100
    counts, seen = [0] * peer_memory.DIRECTIONS, {}
    for to in (1, -1):
        messages = [box._next(counts, to) for _ in range(3 * peer_memory.SLOTS)]
        assert [count for count, _, _ in messages] == list(range(3 * peer_memory.SLOTS))
        slots = [slot for _, slot, _ in messages]
        assert slots[peer_memory.SLOTS :] == slots[: -peer_memory.SLOTS]
        assert [first for _, _, first in messages] == [100 * slot for slot in slots]
        seen[to] = set(slots)
        assert len(seen[to]) == peer_memory.SLOTS
    assert seen[1] | seen[-1] == set(range(peer_memory.DIRECTIONS * peer_memory.SLOTS))


@on_ranks(3, {"context_parallel_size": 3})
def test_stacked_convolutions_equal_one_process(groups, folder):
    """Layers reuse the slots; the second size needs a larger mailbox; a halo passes through ranks with fewer frames."""
    group, (rank, _) = groups.context_group, groups.context
    if groups.device.type != "cpu":
        pytest.skip("with GPUs the mailbox is chosen by itself, in test_frames_over_ranks.py")

    def spread(x, weight):
        size = weight.shape[2] - 1
        if x.shape[2] <= size:
            return F.conv3d(causal_halo(x, size, group=group), weight, padding=(0, 1, 1))
        under_way = start_halo(x, size, group)
        interior = F.conv3d(x, weight, padding=(0, 1, 1))
        edge = torch.cat([under_way.wait(), x[:, :, :size]], dim=2)
        return torch.cat([F.conv3d(edge, weight, padding=(0, 1, 1)), interior], dim=2)

    with pytest.MonkeyPatch.context() as monkeypatch:
        boxes = _through_files(monkeypatch, folder, group, capacity=64)
        for counts, size in (((3, 2, 4), 1), ((1, 3, 1), 2)):
            shape = (4, 4, size + 1, 3, 3)
            weights = [draws.normal(shape, 0, "w", i).double() / 10 for i in range(4)]
            whole = draws.normal((2, 4, sum(counts), 5, 4), 0, "x").double().requires_grad_()
            mine = _cut(whole.detach(), counts, rank).clone().requires_grad_()
            expected, actual = _stack(whole, weights, _whole), _stack(mine, weights, spread)
            assert_close(actual, _cut(expected, counts, rank), 1e-13, f"{counts}")
            pull = draws.normal(tuple(expected.shape), 0, "pull").double()
            expected.backward(pull)
            actual.backward(_cut(pull, counts, rank))
            assert_close(mine.grad, _cut(whole.grad, counts, rank), 1e-12, f"gradient, {counts}")
        through = sum(boxes[0].sent) + sum(boxes[0].received)
        assert through == (rank > 0) * 2 * 4 + (rank < 2) * 2 * 4, "the frames went another way"


@on_ranks(2, {"context_parallel_size": 2})
def test_who_gets_a_mailbox(groups, folder):
    """None on the CPU; none over machines, however alike their names; none where the signals don't fit; else one."""
    group, rank = groups.context_group, groups.context[0]
    assert peer_memory.mailbox_of(group, 100, CPU) is None
    assert isinstance(exchange.transport_of(torch.zeros(4), group), Messages)
    gpu, made, kind = torch.device("cuda", 0), [], peer_memory.Mailbox

    def make(of, capacity, device):
        made.append((capacity, device))
        if len(made) > 2 and rank:
            raise RuntimeError
        box = kind.__new__(kind)
        box.capacity = capacity
        return box

    with pytest.MonkeyPatch.context() as monkeypatch:
        memory = Files(folder, rank)
        monkeypatch.setattr(peer_memory, "_symmetric_memory", lambda: memory)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(peer_memory, "Mailbox", make)
        boxes = peer_memory._mailboxes
        for machine in ("one", f"rank {rank}"):
            boxes.clear()
            monkeypatch.setattr(peer_memory, "_machine", lambda machine=machine: machine)
            box = peer_memory.mailbox_of(group, 3 * 2**20, gpu)
            assert (box is None) == (machine != "one")
        assert made == [(4 * 2**20, gpu)]
        boxes.clear()
        monkeypatch.setattr(peer_memory, "_machine", lambda: "one")
        assert peer_memory.mailbox_of(group, 10, gpu) is peer_memory.mailbox_of(group, 2**20, gpu)
        assert len(made) == 2
        assert peer_memory.mailbox_of(group, 2**20 + 1, gpu) is None, "one rank failed, so none has one"
        assert peer_memory.mailbox_of(group, 10, gpu) is None
        boxes.clear()
        monkeypatch.setattr(memory, "get_signal_pad_size", lambda: 63 if rank else 64)
        assert peer_memory.mailbox_of(group, 10, gpu) is None
        boxes.clear()
    assert len(made) == 3


def test_the_calls_are_those_of_torch():
    """Names and arguments of the functions and methods that the mailbox calls, in the torch that is installed."""
    memory = peer_memory._symmetric_memory()
    handle = memory._SymmetricMemory
    for name in ("empty", "rendezvous", "get_signal_pad_size"):
        assert callable(getattr(memory, name))
    for name, arguments in {
        "get_buffer": ("rank: ", "sizes: ", "dtype: ", "storage_offset: "),
        "put_signal": ("dst_rank: ", "channel: ", "timeout_ms: "),
        "wait_signal": ("src_rank: ", "channel: ", "timeout_ms: "),
    }.items():
        said = getattr(handle, name).__doc__
        places = [said.find(argument) for argument in arguments]
        assert -1 not in places, said
        assert places == sorted(places), said
    needed = peer_memory.CHANNELS * peer_memory.SIGNAL_BYTES
    assert memory.get_signal_pad_size() >= needed * 8, "a node's eight GPUs"


@pytest.mark.gpu
def test_two_processes_on_one_card():
    """What NCCL refuses, symmetric memory can; the script compares with one process, bit for bit."""
    import json
    import subprocess
    import sys
    from pathlib import Path

    script = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks" / "two_processes.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["transport"] == "peer memory"
    assert found["is_bit_exact"]
