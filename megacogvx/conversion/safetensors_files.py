"""Safetensors on disk: one file or shards with an index, read and written one tensor at a time.

The format (github.com/huggingface/safetensors, "Format"): 8 bytes little-endian length of the header, the header as
JSON (name -> dtype, shape, offsets), then the bytes. The library reads; it writes whole files from memory only, so the
few lines that write one tensor after the other stand here.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from megacogvx.conversion.tensors import TensorInfo
from megacogvx.errors import CheckpointError
from megacogvx.log import progress

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
STEM = "diffusion_pytorch_model"  # diffusers' name for the weights of a model
ALIGNMENT = 8  # bytes; of the header, as the library writes it


class SafetensorsFiles:
    """The tensors of one file, or of all shards that an index names."""

    def __init__(self, path: Path) -> None:
        """Read the headers.

        Args:
            path: a `.safetensors` file, an index (`.safetensors.index.json`), or a folder with either.

        Raises:
            CheckpointError: there is none, or a file is damaged, or a shard lacks what the index says.
        """
        self.path = Path(path)
        self._files: dict[str, Path] = {}
        self.infos: dict[str, TensorInfo] = {}
        for file, names in _files(self.path).items():
            infos = _header(file)
            if lacking := names - infos.keys():
                raise CheckpointError(f"{file} lacks {min(lacking)}, which the index beside it promises")
            self.infos |= infos
            self._files |= dict.fromkeys(infos, file)

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor."""
        file = self._files[name]
        try:
            # Opened for each tensor: what the library has mapped would otherwise count as ours until the end.
            with safe_open(file, "pt") as handle:
                return handle.get_tensor(name).clone()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} can't be read: {error}") from None


def write_safetensors(
    folder: Path, infos: Mapping[str, TensorInfo], tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int
) -> list[Path]:
    """Write tensors as they come into one file, or into shards with an index, under diffusers' names.

    Args:
        folder: where to; made if it isn't there.
        infos: what will come, in its order.
        tensors: name and tensor, contiguous, on the CPU.
        max_shard_bytes: a new shard begins before this is exceeded, so one larger tensor is a shard of its own.

    Returns:
        the files with tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = _split(infos, max_shard_bytes)
    count = len(shards)
    names = [
        f"{STEM}.safetensors" if count == 1 else f"{STEM}-{place:05d}-of-{count:05d}.safetensors"
        for place in range(1, count + 1)
    ]
    coming = iter(progress(tensors, f"write {folder.name}", len(infos)))
    for file, shard in zip(names, shards, strict=True):
        with (folder / file).open("wb") as handle:
            _write_header(handle, shard)
            for name, info in shard.items():
                got, tensor = next(coming)
                assert (got, tuple(tensor.shape), tensor.dtype) == (name, *info), (got, tensor.shape, name, info)
                handle.write(raw_bytes(tensor))
    assert next(coming, None) is None, "more tensors came than were announced"
    if count > 1:
        _write_index(folder, names, shards)
    return [folder / name for name in names]


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _files(path: Path) -> dict[Path, set[str]]:
    """Return each file with the names that an index expects in it; without an index nothing is expected."""
    path = _only_one_in(path) if path.is_dir() else path
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    if path.suffix != ".json":
        return {path: set()}
    files: dict[Path, set[str]] = {}
    for name, file in _weight_map(path).items():
        files.setdefault(path.parent / file, set()).add(name)
    return files


def _only_one_in(folder: Path) -> Path:
    """Return a folder's one index, or without an index its one file."""
    indices, singles = sorted(folder.glob("*.safetensors.index.json")), sorted(folder.glob("*.safetensors"))
    if len(indices) == 1:
        return indices[0]
    if not indices and len(singles) == 1:
        return singles[0]
    raise CheckpointError(
        f"{folder} must hold one .safetensors file, or one index of shards; it has {len(singles)} and {len(indices)}"
    )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text())["weight_map"]
        assert isinstance(found, dict) and found
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise CheckpointError(f"{index} is no index of safetensors files: {error!r}") from None
    for file in found.values():
        if not isinstance(file, str) or Path(file).name != file or not (index.parent / file).is_file():
            raise CheckpointError(f"{index} names the shard {file!r}, which is not in its folder")
    return found


def _header(file: Path) -> dict[str, TensorInfo]:
    try:
        with safe_open(file, "pt") as handle:  # checks that header and size fit
            parts = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            return {name: TensorInfo(tuple(part.get_shape()), _dtype(part.get_dtype())) for name, part in parts.items()}
    except (SafetensorError, OSError, KeyError) as error:
        raise CheckpointError(f"{file} is no safetensors file, or it is cut short: {error}") from None


def _dtype(code: str) -> torch.dtype:
    if code not in DTYPES:
        raise SafetensorError(f"dtype {code} is unknown here; known: {', '.join(DTYPES)}")
    return DTYPES[code]


def _split(infos: Mapping[str, TensorInfo], max_shard_bytes: int) -> list[dict[str, TensorInfo]]:
    shards: list[dict[str, TensorInfo]] = [{}]
    used = 0
    for name, info in infos.items():
        if shards[-1] and used + info.nbytes > max_shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = info
        used += info.nbytes
    return shards


def _write_header(handle: BinaryIO, shard: Mapping[str, TensorInfo]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in shard.items():
        header[name] = {
            "dtype": CODES[info.dtype], "shape": list(info.shape), "data_offsets": [offset, offset + info.nbytes]
        }  # fmt: skip
        offset += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    handle.write(struct.pack("<Q", len(text)) + text)


def _write_index(folder: Path, files: list[str], shards: list[dict[str, TensorInfo]]) -> None:
    total = sum(info.nbytes for shard in shards for info in shard.values())
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
