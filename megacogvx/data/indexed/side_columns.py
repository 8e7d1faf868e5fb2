"""Side columns: a number per sample beside the shards, such as an aesthetic or a flow score, that may change.

    DATASET/columns/NAME.g0003.col    the newest generation counts; an older one stays until it is removed

     0   8  magic "MCVXCOL\\0"        8  2  u16 major version    10  2  u16 minor version    12 4 u32 header bytes = 64
    16   8  u64 samples              24   8  u64 xxh3 of the dataset's sample ids, in order
    32   8  u64 xxh3 of the values   40  16  zero               56   8  u64 xxh3 of bytes 0-55
    64      float32 values; NaN: this sample has none

The shards stay untouched, so that thresholds (config, never data) can follow better scores during a run. A column is of
certain samples in a certain order: after samples were added it has to be written again, which reading it says.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np

from megacogvx.data.indexed.durable import write_atomically
from megacogvx.data.indexed.layout import MAJOR, MINOR, check_version, digest, sealed, unseal
from megacogvx.data.indexed.remote import Folder
from megacogvx.errors import DataError

COLUMN_MAGIC = b"MCVXCOL\0"
COLUMN_HEADER = struct.Struct("<8sHHIQQQ16xQ")
COLUMN_NAME = r"[A-Za-z0-9][A-Za-z0-9_-]{0,30}"
FOLDER = "columns"

assert COLUMN_HEADER.size == 64


def write_side_column(folder: Path, name: str, values: np.ndarray, sample_ids: np.ndarray) -> Path:
    """Write the next generation of column `name`; readers see the old one or the whole new one.

    Args:
        folder: of the dataset.
        name: letters, digits, `_` and `-`, at most 31.
        values: `[n]`, kept as float32; NaN where a sample has no value.
        sample_ids: uint64 `[n]`, the dataset's, in order.

    Raises:
        DataError: the name isn't allowed, or there isn't one value per sample.
    """
    if not re.fullmatch(COLUMN_NAME, name):
        raise DataError(f"column name {name!r} must match {COLUMN_NAME}")
    if values.shape != sample_ids.shape:
        raise DataError(f"column {name} has {len(values)} values for {len(sample_ids)} samples of {folder}")
    (folder / FOLDER).mkdir(exist_ok=True)
    data = np.ascontiguousarray(values, "<f4").tobytes()
    header = sealed(
        COLUMN_HEADER, COLUMN_MAGIC, MAJOR, MINOR, COLUMN_HEADER.size, len(values), _ids_hash(sample_ids), digest(data)
    )
    generation = max(_generations(folder, name), default=0) + 1
    path = folder / FOLDER / _file_name(name, generation)
    write_atomically(path, header + data)
    return path


def read_side_column(folder: Folder, name: str, sample_ids: np.ndarray) -> np.ndarray:
    """Return the newest generation of column `name`: float32 `[n]`.

    Raises:
        DataError: there is none, it is damaged, or it is of other samples than `sample_ids` (uint64 `[n]`).
    """
    generations = _generations(folder, name)
    if not generations:
        raise DataError(
            f"dataset {folder} has no side column {name!r} (it has: {', '.join(side_columns(folder)) or 'none'}); "
            "write it with `megacogvx data column`"
        )
    path = folder / FOLDER / _file_name(name, max(generations))
    expected = COLUMN_HEADER.size + 4 * len(sample_ids)
    if path.stat().st_size != expected:
        raise DataError(
            f"{path} has {path.stat().st_size} bytes instead of {expected} for {len(sample_ids)} samples: it is "
            "truncated, or samples were added since; write the column again"
        )
    data = path.read_bytes()
    _, major, minor, _, count, ids_hash, values_hash = unseal(COLUMN_HEADER, data, COLUMN_MAGIC, str(path))
    check_version(major, minor, str(path))
    values = data[COLUMN_HEADER.size :]
    if digest(values) != values_hash:
        raise DataError(f"{path}: the values are damaged (their checksum differs); write the column again")
    if count != len(sample_ids) or ids_hash != _ids_hash(sample_ids):
        raise DataError(f"{path} is of other samples than the dataset holds now; write the column again")
    return np.frombuffer(values, "<f4")


def side_columns(folder: Folder) -> list[str]:
    """Return the names of the side columns of a dataset."""
    names = (re.fullmatch(rf"({COLUMN_NAME})\.g\d+\.col", path.name) for path in (folder / FOLDER).glob("*.col"))
    return sorted({match[1] for match in names if match})


def _generations(folder: Folder, name: str) -> list[int]:
    matches = (
        re.fullmatch(rf"{re.escape(name)}\.g(\d+)\.col", path.name) for path in (folder / FOLDER).glob(f"{name}.g*.col")
    )
    return [int(match[1]) for match in matches if match]


def _file_name(name: str, generation: int) -> str:
    return f"{name}.g{generation:04d}.col"


def _ids_hash(sample_ids: np.ndarray) -> int:
    return digest(np.ascontiguousarray(sample_ids, "<u8").tobytes())
