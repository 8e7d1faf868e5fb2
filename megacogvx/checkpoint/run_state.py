"""All tensors that a run keeps, as megatron-core's sharded tensors under the names of one process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron.core.dist_checkpointing import ShardedTensor
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megacogvx.checkpoint.reading import read_metadata
from megacogvx.checkpoint.together import together
from megacogvx.errors import CheckpointError
from megacogvx.parallel.data_parallel import unwrap
from megacogvx.parallel.groups import ParallelGroups, gather_json
from megacogvx.parallel.optimizer import Optimizer
from megacogvx.parallel.sharded_state import sharded_state_dict

MODEL = "model"  # what the weights that the optimizer steps are called; their names begin with it


class Kept(Protocol):
    """Something that learns beside the model and is kept with it, such as a discriminator or averaged weights."""

    def sharded_state_dict(self) -> dict[str, Any]:
        """Return its sharded tensors, under names of their own; loading writes into them."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `sharded_state_dict` described."""


def run_state(
    model: nn.Module, optimizer: Optimizer | None, beside: Mapping[str, Kept], groups: ParallelGroups,
    weights: str = MODEL,
) -> dict[str, Any]:  # fmt: skip
    """Return the sharded tensors of everything that is kept; they are views of what the rank holds.

    Args:
        model, optimizer, beside, groups: as for `distributed.save`.
        weights: the set of weights that is the model's: its own, or one that was kept beside them, such as "ema".
    """
    model_state = sharded_state_dict(unwrap(model), groups, prefix=f"{weights}.")
    state: dict[str, Any] = {MODEL: model_state}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(model_state)
    assert not state.keys() & beside.keys(), sorted(beside)
    return state | {name: kept.sharded_state_dict() for name, kept in beside.items()}


def take_state(
    loaded: dict[str, Any], model: nn.Module, optimizer: Optimizer | None, beside: Mapping[str, Kept],
    groups: ParallelGroups, weights: str = MODEL,
) -> None:  # fmt: skip
    """Put what was loaded by `run_state`'s names where it belongs."""
    prefix = f"{weights}."
    unwrap(model).load_state_dict({name.removeprefix(prefix): value for name, value in loaded[MODEL].items()})
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"], sharded_state_dict(unwrap(model), groups, prefix=prefix))
    for name, kept in beside.items():
        kept.load_state_dict(loaded[name])


def check_tensors(path: Path, state: dict[str, Any], groups: ParallelGroups, weights: str = MODEL) -> Metadata:
    """Check that the checkpoint holds every tensor that `state` asks for, in the same global shape.

    Returns:
        what its `.metadata` says.

    Raises:
        CheckpointError: it doesn't, or has weights that the model hasn't, or a rank can't read it; on all ranks.
    """
    metadata = together(groups, lambda: read_metadata(path))  # before what the ranks tell each other
    there = {
        key: tuple(entry.size)
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    asked = {tensor.key: tuple(tensor.global_shape) for tensor in tensors_of(state)}
    problems = [
        f"{key} is {there.get(key, 'not there')} in the checkpoint and {shape} in the model"
        for key, shape in sorted(asked.items())
        if there.get(key) != shape
    ]
    # A pipeline stage asks for its own layers only.
    everybody = {key for keys in gather_json(sorted(asked), groups) for key in keys}
    problems += [
        f"{key} is {there[key]} in the checkpoint and not there in the model"
        for key in sorted(there)
        if key.startswith(f"{weights}.") and key not in everybody
    ]
    problems = list(dict.fromkeys(problem for found in gather_json(problems, groups) for problem in found))
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(f"{path} is of another model: {'; '.join(problems[:3])}{more}")
    return metadata


def tensors_of(state: Any) -> list[ShardedTensor]:
    """Return the sharded tensors inside nested dictionaries."""
    if isinstance(state, dict):
        return [tensor for value in state.values() for tensor in tensors_of(value)]
    return [state] if isinstance(state, ShardedTensor) else []
