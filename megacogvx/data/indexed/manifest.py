"""manifest.json: which shards make a dataset.

    {"format": "megacogvx-dataset", "version": 1, "generation": 3, "encoder": {...}, "checksum": "<xxh3 of the rest>",
     "shards": [{"name": ..., "uuid": ..., "samples": ..., "bin_bytes": ..., "idx_bytes": ..., "idx_checksum": ...}]}

A shard becomes part of the dataset with the manifest's next generation; appending is new shards and a new manifest.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError

from megacogvx.config import Section
from megacogvx.data.indexed.durable import write_atomically
from megacogvx.data.indexed.encoder_info import EncoderInfo
from megacogvx.data.indexed.layout import MAX_SHARD_BYTES, ShardIndex, canonical_json, digest, load_json
from megacogvx.data.indexed.parse import parse_index
from megacogvx.data.indexed.remote import Folder
from megacogvx.errors import DataError

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 2**30
SHARD_NAME = r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"  # no dots and separators: a name can't leave the folder
MAPPED_BYTES = 1 << 20  # a dataset of 50,000 small shards would come near the kernel's limit of mappings
HEX_64 = r"^[0-9a-f]{16}$"


class ShardEntry(Section):
    """One shard as the manifest lists it; checksums and uuid as hexadecimal text, since JSON numbers lose bits."""

    name: str = Field(pattern=f"^{SHARD_NAME}$")
    uuid: str = Field(pattern=r"^[0-9a-f]{32}$")
    samples: int = Field(ge=0, lt=2**32)
    bin_bytes: int = Field(ge=64, le=MAX_SHARD_BYTES)
    idx_bytes: int = Field(ge=128, le=MAX_SHARD_BYTES)
    idx_checksum: str = Field(pattern=HEX_64)


class Manifest(Section):
    """The content of manifest.json."""

    format: Literal["megacogvx-dataset"] = "megacogvx-dataset"
    version: Literal[1] = 1
    generation: int = Field(ge=1)
    encoder: EncoderInfo
    shards: tuple[ShardEntry, ...]

    @property
    def checksum(self) -> int:
        """xxh3 of everything in it: two equal manifests name the same data, byte for byte."""
        return digest(canonical_json(self.model_dump(mode="json")))


def read_manifest(folder: Folder) -> Manifest:
    """Read and check FOLDER/manifest.json.

    Raises:
        DataError: there is none, or it is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(
            f"{folder} is not a dataset: it has no {MANIFEST}; finish it first (finish_dataset), or check the path"
        )
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise DataError(f"{path} has {path.stat().st_size} bytes, the limit is {MAX_MANIFEST_BYTES}")
    values = load_json(path.read_bytes(), str(path))
    stored = values.pop("checksum", None)
    try:
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        raise DataError(f"{path}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
    if stored != f"{manifest.checksum:016x}":
        raise DataError(f"{path} is damaged (its checksum differs); write it again with finish_dataset")
    names = [shard.name for shard in manifest.shards]
    if len(set(names)) != len(names):
        raise DataError(f"{path} lists a shard twice")
    return manifest


def finish_dataset(folder: Path, shards: Sequence[str] | None = None) -> Manifest:
    """Publish the finished shards of `folder` as its dataset: write manifest.json with the next generation.

    Args:
        folder: where the writers put their shards.
        shards: names of the shards that have to be there; None takes every finished one.

    Returns:
        The manifest; the old one where nothing has changed.

    Raises:
        DataError: a shard is missing, damaged or of another encoder.
    """
    folder = Path(folder)
    names = sorted(path.stem for path in folder.glob("*.idx")) if shards is None else sorted(shards)
    if not names:
        raise DataError(f"{folder} holds no finished shard (NAME.idx)")
    missing = [name for name in names if not (folder / f"{name}.idx").is_file()]
    if missing:
        raise DataError(f"{folder} lacks the shards {', '.join(missing)}; write them first")
    encoders, entries = [], []
    for name in names:  # one index at a time: those of 50 million samples are 3.5 GB
        index = read_index(folder, name)
        entries.append(_entry(name, index))
        encoders.append(index.encoder)
        differing = differing_keys(encoders[0], index.encoder)
        if differing:
            raise DataError(f"shard {name} of {folder} comes from another encoder than {names[0]}: {differing}")
    old = read_manifest(folder) if (folder / MANIFEST).is_file() else None
    if old is not None and (old.shards, old.encoder) == (tuple(entries), encoders[0]):
        return old
    manifest = Manifest(generation=old.generation + 1 if old else 1, encoder=encoders[0], shards=tuple(entries))
    values: dict[str, Any] = {**manifest.model_dump(mode="json"), "checksum": f"{manifest.checksum:016x}"}
    write_atomically(folder / MANIFEST, canonical_json(values))
    return manifest


def read_index(
    folder: Folder, name: str, check_columns: bool = True, check_rows: bool = True, mapped: bool = False
) -> ShardIndex:
    """Read FOLDER/NAME.idx and check it, and the size of the .bin beside it.

    Args:
        folder: of the dataset.
        name: of the shard.
        check_columns, check_rows: see `parse_index`.
        mapped: map a large file, so that processes share its pages; otherwise it is read into memory.

    Raises:
        DataError: one of the files is missing, has another size than the index says, or is damaged.
    """
    path = folder / f"{name}.idx"
    try:
        data = _mapped(path) if mapped and isinstance(path, Path) else path.read_bytes()
        index = parse_index(data, str(path), check_columns, check_rows)
        bin_bytes = (folder / f"{name}.bin").stat().st_size
    except OSError as error:
        raise DataError(f"shard {name} of {folder}: {error.strerror}: {error.filename or path}") from None
    if bin_bytes != index.bin_bytes:
        raise DataError(
            f"{folder / name}.bin has {bin_bytes} bytes, its index says {index.bin_bytes}: truncated, or not its own"
        )
    return index


def differing_keys(first: EncoderInfo, second: EncoderInfo) -> str:
    """Return `key=a and b` for each key in which two encoders differ; empty if they are the same."""
    pairs = zip(dict(first).items(), dict(second).values(), strict=True)
    return ", ".join(f"{key}={a!r} and {b!r}" for (key, a), b in pairs if a != b)


def _mapped(path: Path) -> memoryview:
    """Return a file's bytes, read-only: a large one as a view of its mapping, which keeps no file open."""
    size = path.stat().st_size
    if size < MAPPED_BYTES:
        return memoryview(path.read_bytes())
    try:
        return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy().data.toreadonly()
    except RuntimeError as error:
        raise DataError(f"{path} can't be mapped: {error}") from None


def _entry(name: str, index: ShardIndex) -> ShardEntry:
    return ShardEntry(
        name=name,
        uuid=index.uuid.hex(),
        samples=len(index),
        bin_bytes=index.bin_bytes,
        idx_bytes=index.idx_bytes,
        idx_checksum=f"{index.checksum:016x}",
    )
