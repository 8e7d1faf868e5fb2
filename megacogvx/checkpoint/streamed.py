"""A checkpoint's weights one tensor at a time, in one process without process groups: for models larger than memory.

What `write_streamed` writes, megatron-core loads on any layout, as it does what a training run saved.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, load, save
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megacogvx.checkpoint import manifest
from megacogvx.checkpoint.directory import CheckpointDirectory
from megacogvx.checkpoint.distributed import FORMAT, STATE
from megacogvx.checkpoint.manifest import verify
from megacogvx.checkpoint.reading import SafeReader
from megacogvx.checkpoint.whole import PREFIX
from megacogvx.checkpoint.writing import WRITER_THREADS
from megacogvx.errors import CheckpointError

Shape = tuple[int, ...]


class StreamedCheckpoint:
    """The weights of a checkpoint, read one tensor at a time.

    Attributes:
        path: its folder.
        tensors: name, without the prefix, to shape and dtype.
    """

    def __init__(self, path: Path, weights: str = PREFIX.rstrip(".")) -> None:
        """Check every file's checksum and read the names.

        Args:
            path: the checkpoint's folder.
            weights: which set of weights: `model`, or another one that the run kept, such as an average of it.

        Raises:
            CheckpointError: it is missing, incomplete or damaged, or has no such set of weights.
        """
        verify(path)
        self.path, self._prefix = path, weights + "."
        self._reader = _CachingReader(path)
        entries = self._reader.read_metadata().state_dict_metadata
        self.tensors: dict[str, tuple[Shape, torch.dtype]] = {
            name.removeprefix(self._prefix): (tuple(entry.size), entry.properties.dtype)
            for name, entry in entries.items()
            if name.startswith(self._prefix) and isinstance(entry, TensorStorageMetadata)
        }
        if not self.tensors:
            sets = sorted({name.split(".")[0] for name in entries} - {"optimizer"})
            raise CheckpointError(f"{path} has no weights {weights!r}; it has {', '.join(sets) or 'none'}")

    def read(self, name: str) -> torch.Tensor:
        """Return one whole tensor, from however many parts it was saved in."""
        shape, dtype = self.tensors[name]
        state = {self._prefix + name: torch.empty(shape, dtype=dtype)}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is the point
                load(state, storage_reader=self._reader, no_dist=True)
        except (CheckpointException, OSError, RuntimeError) as error:
            raise CheckpointError(f"{self.path} can't be read: {error}") from None
        return state[self._prefix + name]


def write_streamed(
    directory: CheckpointDirectory,
    step: int,
    tensors: Mapping[str, tuple[Shape, torch.dtype]],
    read: Callable[[str], torch.Tensor],
    extra: Mapping[str, Any],
    texts: Mapping[str, str],
) -> Path:
    """Write a complete checkpoint of weights alone, asking for one tensor after the other.

    Args:
        directory: where to.
        step: its number.
        tensors: name to shape and dtype, of a whole model.
        read: gives each tensor when its turn comes.
        extra: what `load` returns beside the weights, as JSON values.
        texts: files to put beside, `{name: text}`.

    Returns:
        the checkpoint's folder.

    Raises:
        CheckpointError: a tensor can't be read, or the disk is full or not writable.
    """
    partial = directory.begin(step)
    state = {PREFIX + name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in tensors.items()}
    # A file for each tensor: torch's writer keeps every tensor of a file until the file is closed.
    writer = FileSystemWriter(partial, single_file_per_rank=False, thread_count=WRITER_THREADS, sync_files=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            save(state, storage_writer=writer, planner=_AskingPlanner(read), no_dist=True)
        except CheckpointException as error:  # torch's own, which is a BaseException and holds what was raised inside
            cause = next((failure[0] for failure in error.failures.values()), error)
            problem = cause if isinstance(cause, CheckpointError) else f"{partial} can't be written: {cause}"
            raise CheckpointError(str(problem)) from None
    # What megatron-core looks for beside the tensors (dist_checkpointing/serialization.py, `save`).
    torch.save({"content_metadata": FORMAT}, partial / COMMON_STATE_FNAME)
    save_config(CheckpointingConfig("torch_dist", 1), str(partial))
    for name, text in {**texts, STATE: json.dumps(extra, indent=1)}.items():
        (partial / name).write_text(text)
    return directory.commit(step, {name: manifest.seal(partial, name) for name in manifest.files_of(partial)})


class _CachingReader(SafeReader):
    """Reads the metadata once, not for each tensor."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = super().read_metadata(*args, **kwargs)
        return self._metadata


class _AskingPlanner(DefaultSavePlanner):
    """Plans with tensors that have a shape only; each is asked for when it is written."""

    def __init__(self, read: Callable[[str], torch.Tensor]) -> None:
        super().__init__(flatten_state_dict=False)
        self._ask = read

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self._ask(index.fqn.removeprefix(PREFIX))
