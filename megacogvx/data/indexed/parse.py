"""Read an `.idx`: everything that can be checked of it without the `.bin`, and each row before it is used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from megacogvx.data.indexed.encoder_info import parse_encoder
from megacogvx.data.indexed.layout import (
    ALIGNMENT,
    BIN_HEADER,
    DIRECTORY_ENTRY,
    DTYPE_CODES,
    IDX_HEADER,
    IDX_MAGIC,
    IMAGE_CHANNELS,
    IMAGE_HEADER,
    MAX_METADATA_BYTES,
    MAX_SHARD_BYTES,
    RECORD_HEADER,
    ShardIndex,
    check_version,
    columns_of,
    digest,
    load_json,
    unseal,
)
from megacogvx.errors import DataError


def parse_index(
    data: bytes | memoryview, path: Path | str, check_columns: bool = True, check_rows: bool = True
) -> ShardIndex:
    """Read the bytes of an `.idx` and check everything that can be checked without the `.bin`.

    Args:
        data: the whole file; the columns are views of it.
        path: named in messages.
        check_columns: also compare the hash of each column.
        check_rows: also check every row, which takes longer than all the rest; otherwise call `check_rows` before the
            first of them is used.

    Raises:
        DataError: anything is not as `layout.py` says.
    """
    where, data = str(path), memoryview(data)
    (_, major, minor, _, uuid, count, bin_bytes, idx_bytes, num_columns, alignment, schema_at, schema_bytes,
     directory_at, directory_hash) = unseal(IDX_HEADER, bytes(data[: IDX_HEADER.size]), IDX_MAGIC, where)  # fmt: skip
    check_version(major, minor, where)
    if idx_bytes != len(data):
        raise DataError(f"{where} has {len(data)} bytes, its header says {idx_bytes}: truncated, or written to since")
    if alignment != ALIGNMENT or bin_bytes > MAX_SHARD_BYTES or num_columns > 256:
        raise DataError(f"{where}: alignment {alignment}, {bin_bytes} bytes or {num_columns} columns are out of range")
    schema = bytes(_span(data, schema_at, schema_bytes, f"{where}: schema"))
    directory = bytes(_span(data, directory_at, num_columns * DIRECTORY_ENTRY.size, f"{where}: column directory"))
    if digest(schema + directory) != directory_hash:
        raise DataError(f"{where}: schema or column directory is damaged (its checksum differs)")
    encoder = parse_encoder(load_json(schema, f"{where}: schema"), where)
    columns = _columns(data, directory, columns_of(encoder), where, check_columns)
    index = ShardIndex(
        uuid, encoder, bin_bytes, idx_bytes, columns,
        digest(bytes(data[: IDX_HEADER.size]) + schema + directory),
    )  # fmt: skip
    _check_lengths(index, count, where)
    if check_rows:
        check_index_rows(index, where)
    return index


def _span(data: memoryview, start: int, length: int, where: str) -> memoryview:
    if start + length > len(data):  # Python integers: no wrap at 2^64
        raise DataError(f"{where} reaches to byte {start + length} of {len(data)}")
    return data[start : start + length]


def _columns(
    data: memoryview, directory: bytes, names: Mapping[str, str], where: str, check: bool
) -> dict[str, np.ndarray]:
    columns = {}
    for raw_name, code, offset, length, stored in DIRECTORY_ENTRY.iter_unpack(directory):
        name = raw_name.rstrip(b"\0").decode("ascii", "replace")
        if name not in names:
            continue
        dtype = np.dtype(names[name])
        if code != DTYPE_CODES[names[name]] or length % dtype.itemsize or offset % ALIGNMENT:
            raise DataError(f"{where}: column {name} has dtype code {code}, {length} bytes at {offset}")
        column = _span(data, offset, length, f"{where}: column {name}")
        if check and digest(column) != stored:
            raise DataError(f"{where}: column {name} is damaged (its checksum differs)")
        columns[name] = np.frombuffer(column, dtype=dtype)
    missing = [name for name in names if name not in columns]
    if missing:
        raise DataError(f"{where} lacks the columns {', '.join(missing)}")
    return columns


def _check_lengths(index: ShardIndex, count: int, where: str) -> None:
    """Check that every column has an entry per record."""
    for name, column in index.columns.items():
        if len(column) != count:
            raise DataError(f"{where}: column {name} has {len(column)} entries instead of {count}")


def check_index_rows(index: ShardIndex, where: str) -> None:
    """Check that all records lie in order, aligned and inside the `.bin`; nothing here trusts the columns.

    Raises:
        DataError: one does not.
    """
    names, count = columns_of(index.encoder), len(index)
    if not count:
        return
    offsets = [index.columns[name] for name in names if name == "record" or name.endswith("_offset")]
    if any(int(column.max()) > index.bin_bytes for column in offsets):
        raise DataError(f"{where}: an offset lies beyond the {index.bin_bytes} bytes of the .bin")
    record, text, metadata, *images = (column.astype(np.int64) for column in offsets)
    cells = np.ones(count, np.int64)
    for name in ("frames", "height", "width"):
        cells *= index.columns[name]
    latents_end = record + RECORD_HEADER.size + cells * index.encoder.frame_cell_bytes
    text_end = text + index.columns["text_length"].astype(np.int64) * index.encoder.text_token_bytes
    metadata_end = metadata + index.columns["metadata_length"].astype(np.int64)
    hashes_end = -(-metadata_end // ALIGNMENT) * ALIGNMENT + 8 * (index.columns["frames"].astype(np.int64) + 1)
    following = np.append(record[1:], index.bin_bytes)
    rules = {
        "has no latents": cells < 1,
        "is not aligned": (record | text | metadata) % ALIGNMENT != 0,
        "starts in the header": (record < BIN_HEADER.size) | (text < BIN_HEADER.size),
        "has latents that reach into its metadata": latents_end > metadata,
        "has metadata or hashes that reach into the next record": hashes_end > following,
        "has text beyond its own record": text_end > metadata,
        "has too many text tokens": index.columns["text_length"] > index.encoder.text_length,
        "has too much metadata": index.columns["metadata_length"] > MAX_METADATA_BYTES,
    }
    for image in images:
        pixels = index.columns["image_height"].astype(np.int64) * index.columns["image_width"]
        rules |= {
            "has a first frame that is not aligned": image % ALIGNMENT != 0,
            "has a first frame without a place or a size": (image > 0) != (pixels > 0),
            "has a first frame that overlaps its hashes": (image > 0) & (image < hashes_end + IMAGE_HEADER.size),
            "has a first frame that reaches into the next record": image + pixels * IMAGE_CHANNELS > following,
        }
    for rule, broken in rules.items():
        if broken.any():
            row = int(np.argmax(broken))
            raise DataError(f"{where}: sample {int(index.columns['sample_id'][row])} (record {row}) {rule}")
