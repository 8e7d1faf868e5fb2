"""The ops of the VAE: group norm, the halo's frames, a causal convolution over virtual ranks and over two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any
from unittest import mock

import torch
import torch.nn.functional as F
from scale import Scale
from timing import Found, Tensors, both_ways, copies_needed, share_of, time_of

from megacogvx.testing.tolerance import assert_close
from megacogvx_kernels import group_norm_moments
from megacogvx_kernels.causal_halo import causal_halo, exchange, peer_memory, start_halo
from megacogvx_kernels.causal_halo.frames import last_frames

BYTES, SIZE, RANKS, LAYERS = 2, 2, 4, 2  # of bf16; frames of a halo; virtual ranks; convolutions one after the other
PATIENCE = 60  # seconds for the two processes; a rank that waits for a lost one would wait for minutes
TWO_PROCESSES = Path(__file__).resolve().parent / "two_processes.py"


def group_norm(is_last: bool, scale: Scale, bandwidth: float, ways: str = "eager") -> dict[str, Found]:
    """Time group norm with SiLU, of a contiguous clip or a channels-last one; `ways` as in `bench_tokens.measure`."""
    channels, *place = scale.clip
    layout = torch.channels_last_3d if is_last else torch.contiguous_format
    x = torch.randn(1, channels, *place, device=scale.device, dtype=scale.dtype).to(memory_format=layout)
    affine = [torch.randn(channels, device=scale.device, dtype=scale.dtype).requires_grad_() for _ in range(2)]

    def call(function: Any, x: torch.Tensor) -> Tensors:
        return (function(x, *affine, channels // 4, 1e-6, True),)

    reference = group_norm_moments.reference.group_norm_moments
    ours, eager = partial(call, group_norm_moments.group_norm_moments), partial(call, reference)
    compiled = partial(call, torch.compile(reference, dynamic=False, backend=scale.compiler))
    chosen = {"once": {"ms": ours}, "eager": {"ms": ours, "eager": eager}, "compile": {"compiled": compiled}}[ways]
    values = x.numel() * BYTES
    found = both_ways(chosen, (x,), tuple(affine), (3.0 * values, 5.0 * values), bandwidth, scale)  # x is read twice
    return {f"group_norm_moments + SiLU {way}": each for way, each in found.items()}


def pack(scale: Scale, bandwidth: float) -> dict[str, Found]:
    """Time the packing of two frames of two clips."""
    x = torch.randn(2, *scale.clip, device=scale.device, dtype=scale.dtype)
    frames = x[:, :, -SIZE:]
    least = 2.0 * frames.numel() * BYTES
    sets = [(x.clone(),) for _ in range(copies_needed([frames]))]
    ours = time_of(lambda x: last_frames(x[:, :, -SIZE:], torch.contiguous_format), sets, scale)
    eager = time_of(lambda x: x[:, :, -SIZE:].contiguous(), sets, scale)
    return {"causal_halo pack": {"ms": ours, "share": share_of(bandwidth, least, ours), "eager": eager}}


# -------------------------------------------------------------------------------------------- virtual ranks


class VirtualRank:
    """What the exchange asks a process group."""

    def __init__(self, rank: int, ranks: int) -> None:
        """Take the place of one of several ranks."""
        self._rank, self._ranks = rank, ranks

    def rank(self) -> int:
        """Return this rank's place."""
        return self._rank

    def size(self) -> int:
        """Return how many ranks there are."""
        return self._ranks


class VirtualMemory:
    """torch's symmetric memory as a mailbox calls it, of ranks in one process: plain pointers, and events as signals.

    A rank's signal has to be put before another waits for it, in the order in which this process calls them.
    """

    buffers: dict[int, torch.Tensor]
    signals: dict[tuple[int, int, int], Any]

    def __init__(self, rank: int, buffers: dict[int, torch.Tensor], signals: dict[tuple[int, int, int], Any]) -> None:
        """Take the place of `rank`; buffers and signals are those of all."""
        self.rank, self.buffers, self.signals = rank, buffers, signals

    def empty(self, size: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Allocate this rank's buffer."""
        self.buffers[self.rank] = torch.empty(size, dtype=dtype, device=device)
        return self.buffers[self.rank]

    def rendezvous(self, tensor: torch.Tensor, group: Any) -> VirtualMemory:
        """Return the handle: this object."""
        return self

    def get_buffer(self, rank: int, sizes: tuple[int, ...], dtype: torch.dtype, first: int) -> torch.Tensor:
        """Return a piece of a rank's buffer."""
        return self.buffers[rank][first : first + sizes[0]]

    def put_signal(self, dst_rank: int, channel: int, timeout_ms: int) -> None:
        """Record where the current stream is."""
        event = torch.cuda.Event() if self.buffers[self.rank].is_cuda else None
        if event:
            event.record()
        self.signals[dst_rank, channel, self.rank] = event

    def wait_signal(self, src_rank: int, channel: int, timeout_ms: int) -> None:
        """Let the current stream wait for the other rank's."""
        event = self.signals.pop((self.rank, channel, src_rank))
        if event:
            torch.cuda.current_stream().wait_event(event)


@contextmanager
def mailboxes(ranks: int, capacity: int, device: torch.device) -> Iterator[list[VirtualRank]]:
    """Give every virtual rank a mailbox; within the block, the exchange between them goes through these."""
    buffers: dict[int, torch.Tensor] = {}
    signals: dict[tuple[int, int, int], Any] = {}
    groups, boxes = [VirtualRank(rank, ranks) for rank in range(ranks)], []
    for group in groups:
        memory = VirtualMemory(group.rank(), buffers, signals)
        with mock.patch.object(peer_memory, "_symmetric_memory", lambda memory=memory: memory):
            boxes.append(peer_memory.Mailbox(group, capacity, device))  # type: ignore[arg-type]
    through = lambda message, group: peer_memory.PeerMemory(boxes[group.rank()])  # noqa: E731
    with mock.patch.object(exchange, "transport_of", through):
        yield groups


def virtual_ranks(scale: Scale) -> dict[str, Found]:
    """Convolve a clip whose frames lie on several virtual ranks; each computes its interior while its halo is copied.

    Raises:
        AssertionError: a halo or its gradient isn't the whole clip's bit for bit, or a convolution is off.
    """
    channels, frames, height, width = scale.shard
    x = torch.randn(1, channels, frames, height, width, device=scale.device, dtype=scale.dtype)
    weight = torch.randn(channels, channels, SIZE + 1, 3, 3, device=scale.device, dtype=scale.dtype)
    weight /= (27 * channels) ** 0.5
    capacity = channels * SIZE * height * width * BYTES
    with mailboxes(RANKS, capacity, x.device) as groups:
        _check_halos(x, groups)
        shards = list(x.chunk(RANKS, dim=2))
        spread = partial(_convolve_spread, weight=weight, groups=groups)
        assert_close(torch.cat(spread(*shards), dim=2), _convolve_whole(x, weight), 2e-2, "virtual ranks")
        spread_ms = time_of(spread, [shards], scale)
    whole_ms = time_of(lambda x: _convolve_whole(x, weight), [(x,)], scale)
    found = {"ms": spread_ms, "eager": whole_ms, "remark": "halos bit-exact; eager: one rank with all frames"}
    return {f"{LAYERS} causal convolutions over {RANKS} virtual ranks": found}


def _check_halos(x: torch.Tensor, groups: list[Any]) -> None:
    """Forward: the frames; backward: small integers, which add up exactly in bf16."""
    whole = x.detach().requires_grad_()
    padded = causal_halo(whole, SIZE)
    shards = [shard.detach().requires_grad_() for shard in x.chunk(len(groups), dim=2)]
    halos = [start_halo(shard, SIZE, group).wait() for shard, group in zip(shards, groups, strict=True)]
    first, parts = 0, []
    for shard, halo in zip(shards, halos, strict=True):
        parts.append(padded[:, :, first : first + SIZE])
        assert torch.equal(halo, parts[-1]), f"the halo before frame {first} isn't the whole clip's"
        first += shard.shape[2]
    torch.autograd.backward(parts, [torch.full_like(part, 1.0 + rank) for rank, part in enumerate(parts)])
    for rank in reversed(range(len(groups))):  # a rank's gradient has to be sent before it is waited for
        torch.autograd.backward(halos[rank], torch.full_like(halos[rank], 1.0 + rank))
    assert torch.equal(torch.cat([shard.grad for shard in shards], dim=2), whole.grad), "the halo's gradient is off"


def _convolve_spread(*shards: torch.Tensor, weight: torch.Tensor, groups: list[Any]) -> list[torch.Tensor]:
    """Run the layers of all ranks, each on a stream of its own."""
    on_gpu = weight.is_cuda
    streams = [torch.cuda.Stream() if on_gpu else None for _ in groups]
    done = list(shards)
    for stream in streams:
        peer_memory._follow(stream)
    for _ in range(LAYERS):
        for rank, (group, stream) in enumerate(zip(groups, streams, strict=True)):
            with torch.cuda.stream(stream):
                under_way = start_halo(done[rank], SIZE, group)
                interior = F.conv3d(done[rank], weight, padding=(0, 1, 1))
                edge = torch.cat([under_way.wait(), done[rank][:, :, :SIZE]], dim=2)
                done[rank] = torch.cat([F.conv3d(edge, weight, padding=(0, 1, 1)), interior], dim=2)
    for stream in streams:
        if stream is not None:
            torch.cuda.current_stream().wait_stream(stream)
    return done


def _convolve_whole(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    for _ in range(LAYERS):
        x = F.conv3d(causal_halo(x, SIZE), weight, padding=(0, 1, 1))
    return x


def two_processes(scale: Scale) -> dict[str, Found]:
    """Run two_processes.py: two processes on one card, which NCCL refuses."""
    found = json.loads(_output([sys.executable, str(TWO_PROCESSES), *(["--dry-run"] if scale.is_dry else [])]))
    assert found["is_bit_exact"], "the halo between two processes isn't the whole clip's"
    remark = f"through {found['transport']}, bit-exact; contexts take turns, so no bandwidth follows"
    return {"causal_halo between two processes on one card": {"ms": found["milliseconds"], "remark": remark}}


def _output(command: list[str]) -> str:
    """Return the last line of a program that starts processes of its own; none of them outlives it.

    Raises:
        RuntimeError: it failed, or took longer than `PATIENCE`.
    """
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complained:
        program = subprocess.Popen(command, stdout=said, stderr=complained, start_new_session=True)
        try:
            status = program.wait(PATIENCE)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"no answer within {PATIENCE} s") from error
        finally:
            with suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
            program.wait()
        answer, problem = (_last_line(file) for file in (said, complained))
    if status:
        raise RuntimeError(problem)
    return answer


def _last_line(file: IO[str]) -> str:
    """Return the last line that says something: torch ends the report of a failed process with empty ones."""
    file.seek(0)
    return next((line for line in reversed(file.read().splitlines()) if line.strip()), "no output")
