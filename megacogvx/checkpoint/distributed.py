"""Saving and loading a run: sharded over the ranks, from any (tensor, context, pipeline, data) sizes to any others.

The tensors go through megatron-core's `dist_checkpointing`: each is saved under its global name, a part by each rank
that holds one, and read back in whatever parts the loading ranks hold. Nothing is read before the manifest's checksums
have been found right, and megatron-core's own files only as `reading.py` allows.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from torch import nn

from megacogvx.checkpoint import manifest
from megacogvx.checkpoint.directory import CheckpointDirectory
from megacogvx.checkpoint.manifest import FileEntry
from megacogvx.checkpoint.reading import KnownCommon, read_common, use_known_metadata
from megacogvx.checkpoint.run_state import MODEL, Kept, check_tensors, run_state, take_state
from megacogvx.checkpoint.together import share, together, verify_together
from megacogvx.checkpoint.writing import BACKEND, VERSION, SavePlans, TensorWrite, plan_write
from megacogvx.errors import CheckpointError
from megacogvx.log import get_logger
from megacogvx.parallel.groups import ParallelGroups, any_rank, broadcast_json, gather_json
from megacogvx.parallel.optimizer import Optimizer

STATE = "state.json"
# Optimizer states by global parameter, as core writes them in this format; `parallel/sharded_optimizer.py` does.
FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}

# megatron-core reads through a function of torch that has been renamed.
warnings.filterwarnings("ignore", message=".*`?load_state_dict`? is deprecated", category=FutureWarning)

logger = get_logger(__name__)


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
    plans: SavePlans | None = None,
) -> PendingSave:
    """Begin to write the checkpoint of `step`, as `save` does; it counts from `finish` on.

    Args:
        directory, step, model, optimizer, extra, groups, texts, beside: as for `save`.
        background: copies of the tensors are written by a thread of each rank; what changes afterwards isn't written.
        plans: of the run's earlier saves, which spare this one its exchanges between the ranks.

    Raises:
        CheckpointError: the disk is full or not writable, on any rank; all ranks raise it.
    """
    check_writer()
    partial = Path(broadcast_json(together(groups, lambda: _begin(directory, step, groups)), groups))
    try:
        if groups.is_first:
            texts = {**(texts or {}), STATE: json.dumps(extra, indent=1)}
        together(groups, lambda: _write_texts(partial, texts or {}) if groups.is_first else None)
        state = run_state(model, optimizer, beside or {}, groups)
        known = plans or SavePlans()
        write = together(groups, lambda: plan_write(state, partial, groups, FORMAT, known, background=background))
    except CheckpointError:
        if plans is not None:
            plans.forget()
        directory.drop(step)
        raise
    write.start()
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
        sealed = together(groups, self._write.wait)
        together(groups, lambda: _finish_tensors(partial, self._write, groups))
        tensors = {name: entry for part in gather_json(sealed, groups) for name, entry in part.items()}
        small = broadcast_json(manifest.files_of(partial) if groups.is_first else None, groups)
        small = share([name for name in small if name not in tensors], groups)
        sealed = together(groups, lambda: {name: vars(manifest.seal(partial, name)) for name in small})
        tensors |= {name: entry for part in gather_json(sealed, groups) for name, entry in part.items()}
        entries = {name: FileEntry(**entry) for name, entry in tensors.items()}
        together(groups, lambda: self.directory.commit(self.step, entries) if groups.is_first else None)
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
    return _load_verified(path, model, optimizer, groups, beside or {}, weights)


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
    steps = broadcast_json(together(groups, lambda: directory.steps() if groups.is_first else None), groups)
    for step in reversed(steps):
        path = directory.path(step)
        problems = verify_together(path, groups)
        if not problems:
            return path, _load_verified(path, model, optimizer, groups, beside or {})
        message = f"{path} is damaged: {'; '.join(problems)}"
        if not go_back:
            raise CheckpointError(f"{message}; checkpoint.on_damaged=go_back takes the newest one that is whole")
        if groups.is_first:
            logger.warning("%s; going back to the one before", message)
    if steps:
        raise CheckpointError(f"all {len(steps)} checkpoints in {directory.folder} are damaged; move them away")
    return None


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


def _finish_tensors(path: Path, write: TensorWrite, groups: ParallelGroups) -> None:
    write.finish()
    if groups.is_first:
        save_config(CheckpointingConfig(BACKEND, VERSION), str(path))


def _load_verified(
    path: Path, model: nn.Module, optimizer: Optimizer | None, groups: ParallelGroups, beside: Mapping[str, Kept],
    weights: str = MODEL,
) -> dict[str, Any]:  # fmt: skip
    extra: dict[str, Any] = together(groups, lambda: json.loads((path / STATE).read_text()))
    together(groups, lambda: _load_tensors(path, model, optimizer, beside, groups, weights))
    return extra


def _load_tensors(
    path: Path, model: nn.Module, optimizer: Optimizer | None, beside: Mapping[str, Kept], groups: ParallelGroups,
    weights: str,
) -> None:  # fmt: skip
    state = run_state(model, optimizer, beside, groups, weights)
    # What a rank reads by itself is read before core's exchanges: one whose disk fails would leave the others in them.
    use_known_metadata(check_tensors(path, state, groups, weights))
    common = together(groups, lambda: read_common(path))
    reader = FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), groups.data_context_group)
    loaded = dist_checkpointing.load(state, str(path), reader, KnownCommon(common))
    take_state(loaded, model, optimizer, beside, groups, weights)
