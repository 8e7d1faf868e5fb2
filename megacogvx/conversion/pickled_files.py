"""`.pt` files of `torch.save`: read weights-only, one tensor at a time; written one tensor at a time.

The archive's small pickle is read first, into tensors without storage, which tells where in the file each one's bytes
lie; those are then read when asked for. Only what torch's restricted unpickler knows is made from a file, and the few
harmless kinds below: a file that wants anything else is refused, not run.
"""

from __future__ import annotations

import argparse
import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megacogvx.conversion.safetensors_files import raw_bytes
from megacogvx.conversion.tensors import TensorInfo, shortened
from megacogvx.errors import CheckpointError
from megacogvx.log import progress

# What training states hold beside tensors: arguments, and numpy's generator. Plain data, all of them.
_RECONSTRUCT, _SCALAR = np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0]
HARMLESS: list[Any] = [
    argparse.Namespace, np.ndarray, np.dtype, type(np.dtype("uint32")), type(np.dtype("int64")),
    type(np.dtype("float64")), type(np.dtype("float32")),
    (_SCALAR, "numpy.core.multiarray.scalar"), (_SCALAR, "numpy._core.multiarray.scalar"),
    (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"), (_RECONSTRUCT, "numpy._core.multiarray._reconstruct"),
]  # fmt: skip


class PickledFile:
    """The tensors in one dictionary of a `.pt` file, such as `module` of SAT's.

    Args:
        path: the file.
        key: which entry of the file holds the tensors; several: the first that is there; "" is the file itself.

    Raises:
        CheckpointError: the file isn't there, is damaged, no such archive, wants to make objects of unknown kinds, or
            has no such entry.
    """

    def __init__(self, path: Path, *keys: str) -> None:
        self.path = Path(path)
        content = _read_skeleton(self.path)
        entry = next((key for key in keys if key and isinstance(content.get(key), Mapping)), None)
        if entry is None and keys and "" not in keys:
            raise CheckpointError(
                f"{self.path} has no entry {' or '.join(map(repr, keys))}; it has {shortened(map(str, content))}"
            )
        tensors = content if entry is None else content[entry]
        self._tensors = {str(name): tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
        self.infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in self._tensors.items()}
        self._check_inside()

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor."""
        tensor = self._tensors[name]
        if not tensor.numel():
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        start, count = self._span(tensor)
        data = bytearray(count)
        with self.path.open("rb", buffering=0) as file:
            file.seek(start)
            view = memoryview(data)
            while view and (got := file.readinto(view)):
                view = view[got:]
        if view:
            raise CheckpointError(f"{self.path} ends in the middle of {name}")
        flat = torch.frombuffer(data, dtype=tensor.dtype)
        return flat.as_strided(tensor.shape, tensor.stride()).contiguous()

    def _span(self, tensor: torch.Tensor) -> tuple[int, int]:
        """Return where the tensor's elements begin in the file and how many bytes they span, gaps included."""
        size = tensor.dtype.itemsize
        reach = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return _offset(tensor) + int(tensor.storage_offset()) * size, int(reach) * size

    def _check_inside(self) -> None:
        size = self.path.stat().st_size
        for name, tensor in self._tensors.items():
            if tensor.numel() and sum(self._span(tensor)) > size:
                raise CheckpointError(f"{self.path} is cut short: {name} lies beyond its {size} bytes")


def write_pickled(
    path: Path, key: str, infos: Mapping[str, TensorInfo], tensors: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """Write `{key: {name: tensor}}` as `torch.save` would, filling in one tensor after the other.

    The archive's own CRC-32 of the tensors is not filled in; torch doesn't read it (`torch.serialization`,
    `set_crc32_options`).

    Args:
        path: the file.
        key: of the one entry.
        infos: what will come, in its order.
        tensors: name and tensor, contiguous, on the CPU.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save({key: {name: torch.empty(info.shape, dtype=info.dtype) for name, info in infos.items()}}, path)
    places = PickledFile(path, key)
    left = dict(infos)
    with path.open("rb+", buffering=0) as file:
        for name, tensor in progress(tensors, f"write {path.name}", len(infos)):
            assert left.pop(name) == (tuple(tensor.shape), tensor.dtype), (name, tensor.shape, tensor.dtype)
            file.seek(places._span(places._tensors[name])[0])
            data = raw_bytes(tensor)
            while data:
                data = data[file.write(data) :]
        os.fsync(file.fileno())
    assert not left, f"these were announced and didn't come: {shortened(left)}"


def _offset(tensor: torch.Tensor) -> int:
    # Documented in torch.load's notes on FakeTensorMode: where the storage's bytes begin in the file.
    return cast(int, tensor.untyped_storage()._checkpoint_offset)


def _read_skeleton(path: Path) -> Mapping[str, Any]:
    """Return the file's content with tensors that have no storage."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path} can't be read: it is cut short, foreign, or of torch's format before 1.6 (which can't be read "
            "piece by piece: torch.load it with weights_only=True and torch.save it again)"
        )
    try:
        with FakeTensorMode(), torch.serialization.safe_globals(HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive raises errors of many kinds
        text = str(error)
        asked = re.search(r"(?:GLOBAL|class) (\S+)", text)
        if asked or "Weights only load failed" in text:
            what = f" ({asked[1]})" if asked else ""
            reason = f"it asks for objects other than tensors and plain values{what}, so it was not unpickled"
        else:
            reason = f"it is damaged or foreign ({type(error).__name__})"
        raise CheckpointError(f"{path} can't be read: {reason}") from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not named tensors")
    return content
