"""Which parts of the global optimizer states each rank holds, without a gather.

megatron-core's distributed optimizer keeps, on each data rank, a flat piece of each parameter's states. Its own
resharding formats either gather all pieces on every rank before a save (`fully_reshardable`, which also mistakes the
places of parameters behind the padding between gradient buckets, megatron-core 0.16.1
`distrib_optimizer.get_parameter_state_dp_zero`), or can't change the tensor-parallel size (`dp_reshardable`). Here each
piece is cut into boxes of the parameter's shape, which are views of what the rank holds: nothing is copied or sent, and
what is written are the same global tensors, whatever the layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

PREFIX = "optimizer.state."  # before the state's and the parameter's name, as in megatron-core's own format
Shape = tuple[int, ...]


def boxes(start: int, stop: int, shape: Shape) -> Iterator[tuple[Shape, Shape]]:
    """Cut the elements `start` to `stop` of a row-major tensor into boxes.

    Args:
        start, stop: places in the flat tensor, `0 <= start <= stop <= prod(shape)`.
        shape: of the tensor.

    Yields:
        (offset, shape) of each box, at most `2 * len(shape) - 1`; in order, each contiguous in memory.
    """
    assert 0 <= start <= stop <= prod(shape), (start, stop, shape)
    if start == stop:
        return
    if len(shape) < 2:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # the rows that are whole
    if first > last:
        yield from _in_row(last, start - last * row, stop - last * row, shape)
        return
    yield from _in_row(first - 1, start - (first - 1) * row, row, shape)
    if first < last:
        yield (first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:])
    yield from _in_row(last, 0, stop - last * row, shape)


def sharded_states(optimizer: DistributedOptimizer, model_state: dict[str, Any]) -> dict[str, ShardedTensor]:
    """Return this rank's pieces of master weights and moments, under names of their own.

    Args:
        optimizer: with its moments allocated.
        model_state: sharded tensors of all its parameters, from `sharded_state.sharded_state_dict`.

    Returns:
        `{"exp_avg.model.proj.weight.0": ShardedTensor, ...}`; the tensors are views of the optimizer's own, so loading
        into them loads it.
    """
    of_parameter = {id(sharded.data): sharded for sharded in model_state.values()}
    found = {}
    for parameter, start, stop in _pieces(optimizer):
        sharded = of_parameter[id(parameter)]
        for name, flat in _tensors_of(optimizer, parameter).items():
            for number, box in enumerate(_boxes_of(flat, start, stop, sharded, name)):
                found[f"{name}.{sharded.key}.{number}"] = box
    return found


def load_states(optimizer: DistributedOptimizer, model_state: dict[str, Any], loaded: dict[str, torch.Tensor]) -> None:
    """Put what was loaded by the names of `sharded_states` into the optimizer."""
    ours = sharded_states(optimizer, model_state)
    assert ours.keys() == loaded.keys(), sorted(ours.keys() ^ loaded.keys())[:4]
    with torch.no_grad():
        for name, sharded in ours.items():
            assert sharded.data is not None
            sharded.data.copy_(loaded[name])  # itself, where it was loaded in place


def _in_row(row: int, start: int, stop: int, shape: Shape) -> Iterator[tuple[Shape, Shape]]:
    if start < stop and row >= 0:
        for offset, inner in boxes(start, stop, shape[1:]):
            yield (row, *offset), (1, *inner)


def _pieces(optimizer: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
    """Yield each parameter of which this rank holds states, and which flat range of it."""
    for ranges in optimizer.gbuf_ranges:
        for buckets in ranges.values():
            for bucket in buckets:
                for parameter, places in bucket["param_map"].items():
                    yield parameter, places["param"].start, places["param"].end


def _tensors_of(optimizer: DistributedOptimizer, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """Return the flat states of this rank's piece of a parameter: `param`, `exp_avg`, `exp_avg_sq`."""
    tensors = optimizer._get_main_param_and_optimizer_states(parameter)
    return {name: tensor.detach() for name, tensor in tensors.items() if name != "step"}  # of the group, not of it


def _boxes_of(flat: torch.Tensor, start: int, stop: int, sharded: ShardedTensor, name: str) -> Iterator[ShardedTensor]:
    assert flat.numel() == stop - start and not sharded.prepend_axis_num, sharded
    place = 0
    for offset, shape in boxes(start, stop, tuple(sharded.local_shape)):
        size = prod(shape)
        yield ShardedTensor(
            f"{PREFIX}{name}.{sharded.key}",
            flat.view(-1)[place : place + size].view(shape),
            flat.dtype,
            shape,
            tuple(sharded.global_shape),
            tuple(theirs + ours for theirs, ours in zip(sharded.global_offset, offset, strict=True)),
            None,  # no regular grid
            (*sharded.replica_id[:2], 0),  # no other data rank holds it
        )
        place += size
