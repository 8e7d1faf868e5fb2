"""The halo between two processes on one card, through torch's symmetric memory: what NCCL refuses.

Prints one line of JSON: what carried the frames, whether halo and gradient are the whole clip's bit for bit, and the
median milliseconds of an exchange. The two processes take turns on the card, so the time is no bandwidth. With
--dry-run the same on the CPU, over gloo.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parent), str(FOLDER.parents[1])]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from megacogvx_kernels.causal_halo import causal_halo, exchange, peer_memory, start_halo  # noqa: E402

RANKS, SIZE, REPEATS = 2, 2, 10
SHARED_CARD = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"  # torch refuses two ranks on one card without it


def work(rank: int, folder: str, is_dry: bool) -> None:
    """Be one of the ranks; the first one prints."""
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    device = torch.device("cpu" if is_dry else "cuda:0")
    shape = (1, 8, 6, 4, 6) if is_dry else (1, 128, 16, 240, 360)
    group = dist.group.WORLD
    assert group is not None
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    transport = exchange.transport_of(x[:, :, :SIZE].contiguous(), group).name
    if not is_dry and transport != peer_memory.PeerMemory.name:
        raise RuntimeError(f"no symmetric memory here, and gloo sends no {transport} from a card")
    is_exact = all(_is_exact(x, rank, group) for _ in range(3))  # the slots are used again
    found = {
        "transport": transport,
        "is_bit_exact": bool(_all(is_exact)),
        "milliseconds": statistics.median(_time(x, rank, group) for _ in range(REPEATS)),
    }
    if rank == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def _is_exact(x: torch.Tensor, rank: int, group: dist.ProcessGroup) -> bool:
    whole = x.detach().requires_grad_()
    mine = x.chunk(RANKS, dim=2)[rank].detach().requires_grad_()
    first = rank * mine.shape[2]
    padded, halo = causal_halo(whole, SIZE), start_halo(mine, SIZE, group).wait()
    parts = [padded[:, :, r * mine.shape[2] :][:, :, :SIZE] for r in range(RANKS)]
    torch.autograd.backward(parts, [torch.full_like(part, 1.0 + r) for r, part in enumerate(parts)])
    halo.backward(torch.full_like(halo, 1.0 + rank))
    assert whole.grad is not None and mine.grad is not None
    is_same = torch.equal(halo, parts[rank])
    return is_same and torch.equal(mine.grad, whole.grad[:, :, first : first + mine.shape[2]])


def _all(mine: bool) -> int:
    flag = torch.tensor([int(mine)])
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return int(flag)


def _time(x: torch.Tensor, rank: int, group: dist.ProcessGroup) -> float:
    mine = x.chunk(RANKS, dim=2)[rank]
    dist.barrier()
    began = time.perf_counter()
    start_halo(mine, SIZE, group).wait()
    if x.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - began) * 1e3


def main() -> int:
    """Start the ranks."""
    is_dry = "--dry-run" in sys.argv
    os.environ[SHARED_CARD] = "1"
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (folder, is_dry), nprocs=RANKS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
