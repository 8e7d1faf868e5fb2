"""Saving and loading a run: sharded over the ranks, from any (tensor, context, pipeline, data) sizes to any others.

The tensors go through megatron-core's `dist_checkpointing`: each is saved under its global name, a part by each rank
that holds one, and read back in whatever parts the loading ranks hold. Nothing is read before the manifest's checksums
have been found right, and megatron-core's own files only as `reading.py` allows.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megacogvx.checkpoint import directory as folders
from megacogvx.checkpoint.directory import CheckpointDirectory, FileEntry
from megacogvx.checkpoint.reading import SafeCommonStrategy, read_metadata, use_safe_reader
from megacogvx.checkpoint.writing import BACKEND, VERSION, TensorWrite, plan_write
from megacogvx.errors import CheckpointError
from megacogvx.log import get_logger
from megacogvx.parallel.data_parallel import unwrap
from megacogvx.parallel.groups import ParallelGroups, any_rank, broadcast_json, gather_json
from megacogvx.parallel.optimizer import Optimizer
from megacogvx.parallel.sharded_state import sharded_state_dict

STATE = "state.json"
MODEL = "model"  # what the weights that the optimizer steps are called; their names begin with it
# By global parameter, the one format of optimizer states that can change the tensor-parallel size.
FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}

# megatron-core reads through a function of torch that has been renamed.
warnings.filterwarnings("ignore", message=".*`?load_state_dict`? is deprecated", category=FutureWarning)

Result = TypeVar("Result")
logger = get_logger(__name__)


class Kept(Protocol):
    """Something that learns beside the model and is kept with it, such as a discriminator or averaged weights."""

    def sharded_state_dict(self, metadata: dict[str, Any], *, is_loading: bool = False) -> dict[str, Any]:
        """Return its sharded tensors, under names of their own; `metadata` is megatron-core's choice of format."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `sharded_state_dict` described."""


def save(
    directory: CheckpointDirectory,
    step: int,
    model: nn.Module,
    optimizer: Optimizer | None,
    extra: Mapping[str, Any],
    groups: ParallelGroups,
    *,
    texts: Mapping[str, str] | None = None,
    beside: Mapping[str, Kept] | None = None,
) -> Path:
    """Write the checkpoint of `step`; every rank calls it, and it is complete on disk when this returns.

    Args:
        directory: the run's checkpoints, on a file system that all ranks share.
        step: optimizer steps done.
        model: the model, wrapped or not.
        optimizer: None keeps the weights alone.
        extra: what else a restart needs, as JSON values; rank 0's counts.
        groups: process groups.
        texts: files to put beside, `{name: text}`, such as the config; rank 0's count.
        beside: what else learns, by name.

    Returns:
        the checkpoint's folder.

    Raises:
        CheckpointError: the disk is full or not writable, on any rank; all ranks raise it.
    """
    return start_save(directory, step, model, optimizer, extra, groups, texts=texts, beside=beside).finish()


def start_save(
    directory: CheckpointDirectory,
    step: int,
    model: nn.Module,
    optimizer: Optimizer | None,
    extra: Mapping[str, Any],
    groups: ParallelGroups,
    *,
    texts: Mapping[str, str] | None = None,
    beside: Mapping[str, Kept] | None = None,
    background: bool = False,
) -> PendingSave:
    """Begin to write the checkpoint of `step`, as `save` does; it counts from `finish` on.

    Args:
        directory, step, model, optimizer, extra, groups, texts, beside: as for `save`.
        background: the tensors are written by a child of each rank; what changes them afterwards isn't seen by it.

    Raises:
        CheckpointError: the disk is full or not writable, on any rank; all ranks raise it.
    """
    check_writer()
    partial = Path(broadcast_json(_together(groups, lambda: _begin(directory, step, groups)), groups))
    try:
        if groups.is_first:
            texts = {**(texts or {}), STATE: json.dumps(extra, indent=1)}
        _together(groups, lambda: _write_texts(partial, texts or {}) if groups.is_first else None)
        write = _together(groups, lambda: _plan_tensors(partial, model, optimizer, beside or {}, groups, background))
    except CheckpointError:
        directory.drop(step)
        raise
    return PendingSave(directory, step, partial, write, groups)


class PendingSave:
    """A checkpoint on its way to disk; made by `start_save`. Every rank calls each method, in the same order."""

    def __init__(
        self, directory: CheckpointDirectory, step: int, partial: Path, write: TensorWrite, groups: ParallelGroups
    ) -> None:
        self.directory, self.step, self.partial = directory, step, partial
        self._write, self._groups = write, groups

    def is_done(self) -> bool:
        """Return whether all ranks have written their tensors; then `finish` takes no longer than small files do."""
        return not any_rank(not self._write.is_done(), self._groups)

    def finish(self) -> Path:
        """Wait for all ranks' files and make them the checkpoint of the step.

        Raises:
            CheckpointError: it could not be written, on any rank; all ranks raise it and nothing of it stays.
        """
        try:
            return self._commit()
        except CheckpointError:
            self.directory.drop(self.step)
            raise

    def _commit(self) -> Path:
        groups, partial = self._groups, self.partial
        sealed = _together(groups, self._write.wait)
        _together(groups, lambda: _finish_tensors(partial, self._write, groups))
        tensors = {name: entry for part in gather_json(sealed, groups) for name, entry in part.items()}
        small = broadcast_json(folders.files_of(partial) if groups.is_first else None, groups)
        small = _share([name for name in small if name not in tensors], groups)
        sealed = _together(groups, lambda: {name: vars(folders.seal(partial, name)) for name in small})
        tensors |= {name: entry for part in gather_json(sealed, groups) for name, entry in part.items()}
        entries = {name: FileEntry(**entry) for name, entry in tensors.items()}
        _together(groups, lambda: self.directory.commit(self.step, entries) if groups.is_first else None)
        path = self.directory.path(self.step)
        total = sum(entry.size for entry in entries.values())
        logger.info("saved %s: %d files, %.1f MB", path, len(entries), total / 1e6)
        return path


def load(
    path: Path,
    model: nn.Module,
    optimizer: Optimizer | None,
    groups: ParallelGroups,
    *,
    beside: Mapping[str, Kept] | None = None,
    weights: str = MODEL,
) -> dict[str, Any]:
    """Load a checkpoint into `model` and `optimizer`, whatever layout wrote it; every rank calls it.

    Args:
        path: the checkpoint's folder.
        model: the model, wrapped or not; its weights are overwritten.
        optimizer: None loads the weights alone. An optimizer that exists already and isn't loaded must
            `reload_weights()` afterwards.
        groups: process groups.
        beside: what else is loaded, by the names that `save` was given; what isn't named is left alone.
        weights: the set of weights that the model gets: its own, or one that was kept beside them, such as "ema".

    Returns:
        what `save` got as `extra`.

    Raises:
        CheckpointError: the checkpoint is missing, incomplete, damaged, or of another model; all ranks raise it, and
            name the file or the tensor. Before any tensor is read, except for errors of the disk.
    """
    path = Path(path)
    problems = verify_together(path, groups)
    if problems:
        raise CheckpointError(f"{'; '.join(problems)}; take another checkpoint")
    extra: dict[str, Any] = _together(groups, lambda: json.loads((path / STATE).read_text()))
    _together(groups, lambda: _load_tensors(path, model, optimizer, beside or {}, groups, weights))
    return extra


def load_newest(
    directory: CheckpointDirectory,
    model: nn.Module,
    optimizer: Optimizer | None,
    groups: ParallelGroups,
    *,
    go_back: bool = True,
    beside: Mapping[str, Kept] | None = None,
) -> tuple[Path, dict[str, Any]] | None:
    """Load the newest checkpoint of a run whose files are all right; every rank calls it.

    Args:
        directory: the run's checkpoints.
        model, optimizer, groups, beside: as for `load`.
        go_back: leave a damaged checkpoint out, with a warning that names its files; else it is an error.

    Returns:
        (checkpoint, what `save` got as `extra`); None if the run has no checkpoint.

    Raises:
        CheckpointError: the newest is damaged and `go_back` is off, all are damaged, or one is of another model.
    """
    steps = broadcast_json(_together(groups, lambda: directory.steps() if groups.is_first else None), groups)
    for step in reversed(steps):
        path = directory.path(step)
        problems = verify_together(path, groups)
        if not problems:
            return path, load(path, model, optimizer, groups, beside=beside)
        message = f"{path} is damaged: {'; '.join(problems)}"
        if not go_back:
            raise CheckpointError(f"{message}; checkpoint.on_damaged=go_back takes the newest one that is whole")
        if groups.is_first:
            logger.warning("%s; going back to the one before", message)
    if steps:
        raise CheckpointError(f"all {len(steps)} checkpoints in {directory.folder} are damaged; move them away")
    return None


def verify_together(path: Path, groups: ParallelGroups) -> list[str]:
    """Check all files of a checkpoint against its manifest, each rank a share; return what is wrong, on every rank."""
    try:
        _, entries = _together(groups, lambda: folders.read_manifest(path))
    except CheckpointError as error:
        return [str(error)]
    if groups.is_first:
        logger.info("checking %s: %d files", path, len(entries))
    mine = folders.damaged_files(path, entries, _share(sorted(entries), groups))
    if groups.is_first:
        mine = folders.foreign_files(path, entries) + mine
    return [problem for problems in gather_json(mine, groups) for problem in problems]


def check_writer() -> None:
    """Check that what megatron-core's writer needs is there.

    Raises:
        CheckpointError: psutil can't be imported; without it the writer's process dies and the ranks wait for ever.
    """
    if importlib.util.find_spec("psutil") is None:
        raise CheckpointError(
            "saving a checkpoint needs the package psutil, which is not installed; pip install psutil"
        )


def _begin(directory: CheckpointDirectory, step: int, groups: ParallelGroups) -> str | None:
    return str(directory.begin(step)) if groups.is_first else None


def _write_texts(path: Path, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
        (path / name).write_text(text)


def _plan_tensors(
    path: Path, model: nn.Module, optimizer: Optimizer | None, beside: Mapping[str, Kept],
    groups: ParallelGroups, background: bool,
) -> TensorWrite:  # fmt: skip
    state = _state(model, optimizer, beside, groups, is_loading=False)
    return plan_write(state, path, groups, FORMAT, background=background)


def _finish_tensors(path: Path, write: TensorWrite, groups: ParallelGroups) -> None:
    write.finish()
    if groups.is_first:
        save_config(CheckpointingConfig(BACKEND, VERSION), str(path))


def _load_tensors(
    path: Path, model: nn.Module, optimizer: Optimizer | None, beside: Mapping[str, Kept], groups: ParallelGroups,
    weights: str,
) -> None:  # fmt: skip
    state = _state(model, optimizer, beside, groups, is_loading=True, weights=weights)
    _check_tensors(path, state, groups, weights)
    reader = FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), groups.data_context_group)
    use_safe_reader()
    loaded = dist_checkpointing.load(state, str(path), reader, SafeCommonStrategy())
    prefix = f"{weights}."
    unwrap(model).load_state_dict({name.removeprefix(prefix): value for name, value in loaded[MODEL].items()})
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
    for name, kept in beside.items():
        kept.load_state_dict(loaded[name])


def _state(
    model: nn.Module,
    optimizer: Optimizer | None,
    beside: Mapping[str, Kept],
    groups: ParallelGroups,
    *,
    is_loading: bool,
    weights: str = MODEL,
) -> dict[str, Any]:
    """Return the sharded tensors of everything that is kept, under the names of one process."""
    model_state = sharded_state_dict(unwrap(model), groups, prefix=f"{weights}.")
    state: dict[str, Any] = {MODEL: model_state}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(model_state, FORMAT, is_loading=is_loading)
    assert not state.keys() & beside.keys(), sorted(beside)
    for name, kept in beside.items():
        state[name] = kept.sharded_state_dict(FORMAT, is_loading=is_loading)
    return state


def _check_tensors(path: Path, state: dict[str, Any], groups: ParallelGroups, weights: str = MODEL) -> None:
    """Check that the checkpoint holds every tensor that `state` asks for, in the same global shape."""
    there = {
        key: tuple(entry.size)
        for key, entry in read_metadata(path).state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    asked = {tensor.key: tuple(tensor.global_shape) for tensor in _tensors(state)}
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
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(f"{path} is of another model: {'; '.join(problems[:3])}{more}")


def _tensors(state: Any) -> list[dist_checkpointing.ShardedTensor]:
    if isinstance(state, dict):
        return [tensor for value in state.values() for tensor in _tensors(value)]
    return [state] if isinstance(state, dist_checkpointing.ShardedTensor) else []


def _share(names: list[str], groups: ParallelGroups) -> list[str]:
    """Return this rank's share of the files, to hash and sync."""
    return names[groups.rank :: groups.world_size]


def _together(groups: ParallelGroups, act: Callable[[], Result]) -> Result:
    """Return `act()`; if it fails on any rank, raise `CheckpointError` with the first such rank's message on all."""
    result, problem = None, None
    try:
        result = act()
    except CheckpointError as error:
        problem = str(error)
    except (Exception, CheckpointException) as error:  # torch's own is a BaseException
        logger.debug("checkpoint", exc_info=True)
        problem = f"{type(error).__name__}: {error}"
    problems = [text for text in gather_json(problem, groups) if text]
    if problems:
        raise CheckpointError(problems[0])
    return result  # type: ignore[return-value]
