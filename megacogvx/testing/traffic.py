"""Counts what a rank exchanges with others, by watching the collectives that it starts."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

Exchange = tuple[str, tuple[int, ...], int]  # collective, ranks of its group, bytes of the whole tensor
_NAMES = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "alltoall_": "all_to_all",
    "broadcast_": "broadcast",
    "send": "send",
}


class CountedTraffic(TorchDispatchMode):
    """Within it, every collective of this rank is counted, in the backward pass too.

    Attributes:
        exchanges: how often each (collective, ranks, bytes) was started. The bytes are those of the whole tensor: what
            an all-gather returns, what the others start from.
    """

    def __init__(self) -> None:
        super().__init__()
        self.exchanges: Counter[Exchange] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count `func` if it is a collective, and run it."""
        if func.namespace == "c10d":
            name = _NAMES.get(func.__name__.partition(".")[0])
            if name:
                self.exchanges[name, _ranks(args), max(_bytes(argument) for argument in args)] += 1
        return func(*args, **(kwargs or {}))


def _ranks(args: tuple[Any, ...]) -> tuple[int, ...]:
    group = next(dist.ProcessGroup.unbox(argument) for argument in args if isinstance(argument, torch.ScriptObject))
    return tuple(dist.get_process_group_ranks(group))


def _bytes(argument: Any) -> int:
    """Return the bytes of a tensor or of a list of them; 0 for anything else."""
    if isinstance(argument, torch.Tensor):
        return argument.nbytes
    return sum(map(_bytes, argument)) if isinstance(argument, list | tuple) else 0
