"""Reads megatron-core's own files of a checkpoint without running anything that such a file could ask for.

`.metadata` (which tensor lies where) and `common.pt` (the optimizer's numbers) are pickles, and a pickle may name any
function of any module to be called. torch reads the first with the plain unpickler, and the objects in the shards with
`weights_only=False` wherever `.metadata` calls something an object. Here `.metadata` may name the classes of
`RECORDS` and `VALUES` alone, holds tensors alone, and points at shards of its own folder; all else is read
weights-only.
"""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path, PosixPath
from typing import Any, ClassVar

import torch
from megatron.core.dist_checkpointing.strategies import torch as core_strategies
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME, TorchCommonLoadStrategy
from torch.distributed.checkpoint import FileSystemReader, filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megacogvx.errors import CheckpointError

METADATA = ".metadata"
SHARD_NAME = re.compile(r"[A-Za-z0-9_]+\.distcp")

# Dataclasses whose fields are filled in: nothing of theirs runs.
RECORDS: tuple[type, ...] = (
    metadata.Metadata,
    metadata.TensorStorageMetadata,
    metadata.TensorProperties,
    metadata.ChunkStorageMetadata,
    metadata.MetadataIndex,
    metadata.StorageMeta,
    filesystem._StorageInfo,
    planner.SavePlan,
    planner.WriteItem,
    planner.TensorWriteData,
)
# What is called with plain values: sizes, members of enumerations, the table of tensor layouts, and paths, as which
# torch's own writer notes the folder.
VALUES: tuple[Any, ...] = (
    torch.Size,
    PosixPath,
    metadata._MEM_FORMAT_ENCODING,
    planner.WriteItemType,
    torch.serialization._get_layout,
)
_ADMITTED = {(item.__module__, item.__qualname__): item for item in (*RECORDS, *VALUES)}
_ADMITTED |= {("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class _MetadataUnpickler(pickle._Unpickler):
    """The unpickler in Python, of which each step that could touch more than new records is checked."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise CheckpointError(f"it asks for {module}.{name}, which no checkpoint needs")
        return _ADMITTED[module, name]

    def get_extension(self, code: int) -> None:
        raise CheckpointError(f"it asks for the registered extension {code}, which no checkpoint needs")

    def load_reduce(self) -> None:
        function = self.stack[-2]
        if not any(function is value for value in VALUES):
            raise CheckpointError(f"it calls {function!r}")
        super().load_reduce()  # type: ignore[misc]

    def load_newobj(self) -> None:
        if self.stack[-2] not in RECORDS:
            raise CheckpointError(f"it makes a {self.stack[-2]!r}")
        super().load_newobj()  # type: ignore[misc]

    def load_build(self) -> None:
        if type(self.stack[-2]) not in RECORDS:  # a class or an enumeration's member would stay changed
            raise CheckpointError(f"it changes {self.stack[-2]!r}")
        super().load_build()  # type: ignore[misc]

    def refuse(self) -> None:
        raise CheckpointError("it makes objects in a way that no checkpoint needs")

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.BUILD[0]] = load_build
    for _opcode in (pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.PERSID, pickle.BINPERSID):
        dispatch[_opcode[0]] = refuse


def read_metadata(path: Path) -> Metadata:
    """Return what `.metadata` of the checkpoint `path` says: names, shapes and places of its tensors.

    Raises:
        CheckpointError: it can't be read, asks for anything but the classes of a checkpoint, holds other objects than
            tensors, or points outside the folder.
    """
    file = Path(path) / METADATA
    try:
        content = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} can't be read: {error}") from None
    try:
        result = _MetadataUnpickler(io.BytesIO(content)).load()
        _check(result)
    except CheckpointError as error:
        raise CheckpointError(f"{file} is refused: {error}; take a checkpoint that this program wrote") from None
    except Exception as error:  # a damaged pickle fails in every way there is
        raise CheckpointError(f"{file} can't be read ({type(error).__name__}: {error})") from None
    vars(result).pop("all_local_plans", None)  # megatron-core's memory of how it was written
    return result


class SafeReader(FileSystemReader):
    """torch's reader of checkpoints with `read_metadata` of this module; tensors it reads weights-only already."""

    def read_metadata(self, *arguments: Any, **options: Any) -> Metadata:
        """Return the metadata, checked."""
        result = read_metadata(Path(self.path))
        result.storage_meta = result.storage_meta or metadata.StorageMeta()
        result.storage_meta.load_id = self.load_id
        return result


class KnownReader(SafeReader):
    """A reader whose checkpoint's metadata has been read and checked already; it reads tensors alone.

    Args:
        path: of the checkpoint.
        content: from `read_metadata`.
    """

    def __init__(self, path: str | Path, content: Metadata) -> None:
        super().__init__(path)
        self._content = content

    def read_metadata(self, *arguments: Any, **options: Any) -> Metadata:
        """Return the metadata, without touching the disk."""
        self._content.storage_meta = self._content.storage_meta or metadata.StorageMeta()
        self._content.storage_meta.load_id = self.load_id
        return self._content


class KnownCommon(TorchCommonLoadStrategy):
    """Hands megatron-core the plain values that `read_common` has read.

    Args:
        values: the checkpoint's.
    """

    def __init__(self, values: Any) -> None:
        super().__init__()
        self._values = values

    def load_common(self, checkpoint_dir: str | Path) -> Any:
        """Return the plain values."""
        return self._values


def read_common(path: Path) -> Any:
    """Return the plain values of the checkpoint `path` (`common.pt`), read weights-only whatever the environment says.

    Raises:
        CheckpointError: the file is missing, damaged, or holds more than tensors and plain values.
    """
    file = Path(path) / COMMON_STATE_FNAME
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{file} can't be read as plain values: {error}") from None


def use_known_metadata(content: Metadata) -> None:
    """Let megatron-core's next load take `.metadata` as `read_metadata` gave it; it has no other place to say so."""
    assert hasattr(core_strategies, "_get_filesystem_reader"), "megatron-core opens checkpoints in another way"
    core_strategies._get_filesystem_reader = lambda path, cache_metadata=False: KnownReader(path, content)


def _check(result: Any) -> None:
    if type(result) is not Metadata or not isinstance(result.storage_data, dict):
        raise CheckpointError(f"it holds a {type(result).__name__}")
    for name, entry in result.state_dict_metadata.items():
        if type(entry) is not TensorStorageMetadata:
            raise CheckpointError(f"{name!r} is no tensor")
    for place in result.storage_data.values():
        if type(place) is not filesystem._StorageInfo or place.transform_descriptors:
            raise CheckpointError(f"{place!r} is no plain place in a file")
        if not SHARD_NAME.fullmatch(place.relative_path):
            raise CheckpointError(f"{place.relative_path!r} is no file of this folder")
