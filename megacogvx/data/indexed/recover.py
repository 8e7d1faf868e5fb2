"""Rebuild the lost or damaged `.idx` of a shard from the record headers in its `.bin`."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megacogvx.data.indexed.durable import write_atomically
from megacogvx.data.indexed.encoder_info import EncoderInfo
from megacogvx.data.indexed.layout import (
    ALIGNMENT,
    BIN_HEADER,
    BIN_MAGIC,
    IMAGE_CHANNELS,
    IMAGE_COLUMNS,
    IMAGE_HEADER,
    IMAGE_MAGIC,
    IMAGE_RECORD_MAGIC,
    MAX_METADATA_BYTES,
    RECORD_HEADER,
    RECORD_MAGIC,
    aligned,
    check_version,
    columns_of,
    digest,
    load_json,
    sealed_hashes,
    unseal,
    write_index,
)
from megacogvx.data.indexed.parse import parse_index
from megacogvx.errors import DataError


@dataclass(frozen=True)
class RecoverReport:
    """What was found.

    Attributes:
        samples: how many records the new index holds.
        lost: records that are damaged, by the numbers that are missing.
        path: the index that was written.
    """

    samples: int
    lost: list[int]
    path: Path


def recover_shard(folder: Path, name: str, encoder: EncoderInfo) -> RecoverReport:
    """Write FOLDER/NAME.idx anew from FOLDER/NAME.bin; what was there is kept as NAME.idx.old.

    Everything of a record is checked as it was when written; a record of which anything is damaged is left out.

    Args:
        folder: of the dataset.
        name: of the shard.
        encoder: from the manifest, or from another shard.

    Raises:
        DataError: the .bin's header is damaged or of another encoder, or it holds no whole record.
    """
    path = folder / f"{name}.bin"
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} can't be read: {error}") from None
    _, major, minor, _, uuid, *fields = unseal(BIN_HEADER, data[: BIN_HEADER.size], BIN_MAGIC, str(path))
    check_version(major, minor, str(path))
    if tuple(fields) != encoder.bin_header_values:
        raise DataError(f"{path} holds (channels, text width, dtype codes) {fields}: another encoder made it")
    rows, numbers = _walk(data, encoder)
    if not rows:
        raise DataError(f"{path} holds no whole record")
    dtypes = columns_of(encoder)
    columns = {key: np.array([row[key] for row in rows], dtypes[key]) for key in dtypes}
    index = write_index(uuid, encoder, len(data), columns)
    target = folder / f"{name}.idx"
    parse_index(index, target)  # our own checks have to accept it
    if target.exists():
        target.replace(target.with_suffix(".idx.old"))
    write_atomically(target, index)
    return RecoverReport(len(rows), sorted(set(range(numbers[-1] + 1)) - set(numbers)), target)


def _walk(data: mmap.mmap, encoder: EncoderInfo) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the columns' values of each whole record, and the records' numbers; what is damaged is stepped over."""
    rows: list[dict[str, Any]] = []
    numbers: list[int] = []
    start = BIN_HEADER.size
    while start + RECORD_HEADER.size <= len(data):
        found = _record(data, start, encoder)
        if found is None or (numbers and found[1] <= numbers[-1]):
            start += ALIGNMENT  # not a record, or one that a damaged copy of the file repeats
            continue
        row, number, start = found
        rows.append(row)
        numbers.append(number)
    return rows, numbers


def _record(data: mmap.mmap, start: int, encoder: EncoderInfo) -> tuple[dict[str, Any], int, int] | None:
    """Return (values, number, start of the next record) of the record at `start`, or None if it isn't whole."""
    magic = data[start : start + 4]
    if magic not in (RECORD_MAGIC, IMAGE_RECORD_MAGIC):
        return None
    try:
        header = unseal(RECORD_HEADER, data[start : start + RECORD_HEADER.size], magic, "record")
    except DataError:
        return None
    _, frames, height, width, channels, length, sample_id, text_at, text_hash, note_bytes, note_hash, number = header
    frame = height * width * encoder.frame_cell_bytes
    latents_at = start + RECORD_HEADER.size
    text_bytes = length * encoder.text_token_bytes
    own_text_at = aligned(latents_at + frames * frame)
    note_at = aligned(own_text_at + text_bytes) if text_at == own_text_at else own_text_at
    hashes_at = aligned(note_at + note_bytes)
    end = aligned(hashes_at + 8 * (frames + 1))
    if channels != 2 * encoder.latent_channels or not frames * frame or end > len(data):
        return None
    if note_bytes > MAX_METADATA_BYTES or length > encoder.text_length or text_at > own_text_at:
        return None
    note = data[note_at : note_at + note_bytes]
    try:
        load_json(note, "metadata")
    except DataError:
        return None
    if digest(data[text_at : text_at + text_bytes]) != text_hash or note_hash not in (0, digest(note) % 2**32):
        return None
    latents = [data[at : at + frame] for at in range(latents_at, latents_at + frames * frame, frame)]
    hashes = sealed_hashes([digest(each) for each in latents])
    if data[hashes_at : hashes_at + len(hashes)] != hashes:
        return None
    image: dict[str, int] | None = dict.fromkeys(IMAGE_COLUMNS, 0) if encoder.first_frame else {}
    if magic == IMAGE_RECORD_MAGIC:
        image = _image(data, end, sample_id) if encoder.first_frame else None
    if image is None:
        return None
    values = {
        "sample_id": sample_id, "record": start, "frames": frames, "height": height, "width": width,
        "text_offset": text_at, "text_length": length, "text_hash": text_hash, "metadata_offset": note_at,
        "metadata_length": note_bytes, "metadata_hash": digest(note),
        "latent_hash": digest(hashes[:-8]), **image,
    }  # fmt: skip
    if image and image["image_offset"]:
        end = aligned(image["image_offset"] + image["image_height"] * image["image_width"] * IMAGE_CHANNELS)
    return values, number, end


def _image(data: mmap.mmap, start: int, sample_id: int) -> dict[str, int] | None:
    """Return the columns of the first frame whose header is at `start`; None: it is damaged."""
    pixels_at = start + IMAGE_HEADER.size
    try:
        header = unseal(IMAGE_HEADER, data[start:pixels_at], IMAGE_MAGIC, "first frame")
    except DataError:
        return None
    _, height, width, channels, owner, stored = header
    pixels = data[pixels_at : pixels_at + height * width * channels]
    if channels != IMAGE_CHANNELS or owner != sample_id or not height * width or digest(pixels) != stored:
        return None
    return dict(zip(IMAGE_COLUMNS, (pixels_at, height, width, stored), strict=True))
