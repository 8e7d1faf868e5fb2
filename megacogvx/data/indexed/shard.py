"""Shard: the records of one `.bin` and `.idx` as torch tensors that view the mapped file, without a copy."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from megacogvx.data.indexed.copying import RecordCopier
from megacogvx.data.indexed.fields import field_dtype
from megacogvx.data.indexed.headers import check_bin_header, check_record_header, damaged
from megacogvx.data.indexed.layout import (
    IMAGE_CHANNELS,
    IMAGE_COLUMNS,
    RECORD_HEADER,
    ShardIndex,
    aligned,
    digest,
    load_json,
)
from megacogvx.data.indexed.manifest import MANIFEST, ShardEntry, read_index
from megacogvx.data.indexed.parse import check_index_rows
from megacogvx.data.indexed.record import Record, bytes_of, check_values
from megacogvx.data.indexed.remote import Folder
from megacogvx.data.indexed.source import Access, MappedSource, Source, open_source
from megacogvx.errors import DataError

Verify = Literal["always", "once", "never"]
Allocate = Callable[[int], torch.Tensor]  # bytes -> uint8 `[bytes]`, contiguous
READ_COLUMNS = (
    "record", "frames", "height", "width", "text_offset", "text_length", "metadata_offset", "metadata_length",
    "sample_id",
)  # fmt: skip


class Shard:
    """One shard: its index, and its .bin opened at the first read."""

    def __init__(
        self, folder: Folder, name: str, verify: Verify = "always", entry: ShardEntry | None = None,
        access: Access = "mmap",
    ) -> None:  # fmt: skip
        """Read NAME.idx and check that it belongs to NAME.bin and to the manifest's `entry`.

        Whether each row agrees with the others is looked at before the first record is read.

        Raises:
            DataError: a file is missing, damaged, or of another shard.
        """
        self.path, self.name, self.verify = folder / f"{name}.bin", name, verify
        self.index: ShardIndex = read_index(
            folder, name, check_columns=verify != "never", check_rows=False, mapped=access == "mmap"
        )
        if entry is not None and (entry.idx_checksum, entry.uuid, entry.samples) != (
            f"{self.index.checksum:016x}", self.index.uuid.hex(), len(self.index),
        ):  # fmt: skip
            raise DataError(
                f"{folder / name}.idx isn't the one that {MANIFEST} lists; run finish_dataset if it was rewritten"
            )
        check_bin_header(self.path, self.index)
        self.access = access
        self._columns = [self.index.columns[name].data for name in READ_COLUMNS]
        self._frames = self._columns[READ_COLUMNS.index("frames")]
        encoder = self.index.encoder
        self._dtypes = field_dtype(encoder.latent_dtype), field_dtype(encoder.text_dtype)
        self._channels, self._text_shape = 2 * encoder.latent_channels, encoder.text_shape
        self._cell_bytes, self._token_bytes = encoder.frame_cell_bytes, encoder.text_token_bytes
        self._mapped: dict[torch.dtype, torch.Tensor] = {}  # the whole file as values of a dtype, made once
        self._rows_checked = False
        self._seen = np.zeros(len(self.index) if verify == "once" else 0, bool)

    @cached_property
    def source(self) -> Source:
        """The bytes of the .bin.

        Raises:
            DataError: a row of the index is impossible, or the file can't be opened.
        """
        if not self._rows_checked:
            path = self.path.with_suffix(".idx") if isinstance(self.path, Path) else self.path
            check_index_rows(self.index, str(path))
            self._rows_checked = True
        return open_source(self.path, self.index.bin_bytes, self.access)

    @cached_property
    def copier(self) -> RecordCopier:
        """What copies records into the caller's memory."""
        return RecordCopier(self.index, self.source, lambda row, what: DataError(self._damaged(row, what)))

    def close(self) -> None:
        """Let go of the .bin, unless tensors view it still; the next read opens it again."""
        for name in ("source", "copier"):
            self.__dict__.pop(name, None)
        self._mapped = {}

    def copy(self, row: int, frames: range | None, out: np.ndarray) -> int:
        """Copy record `row`, see `IndexedDataset.read_into`."""
        try:
            return self._copied(row, frames, out)
        except DataError as error:
            raise self._named(row, error) from error

    def _copied(self, row: int, frames: range | None, out: np.ndarray) -> int:
        check, whole = self._checks(row), frames is None or len(frames) == self._frames[row]
        if whole and not check:
            return self.copier.whole(row, out)
        end = self.copier.frames(row, frames, out, check)
        if check and self.verify == "once":
            self._seen[row] |= whole and not self.index.encoder.first_frame
        return end

    def record(self, row: int, frames: range | None = None, first_frame: bool = False) -> Record:
        """Return record `row`, or the latent frames `frames` of it; with its first frame's pixels if asked for.

        Raises:
            DataError: the file is shorter than it was, or bytes differ from their checksum; names the sample.
        """
        try:
            return self._viewed(row, frames, first_frame)
        except DataError as error:
            raise self._named(row, error) from error

    def _viewed(self, row: int, frames: range | None, first_frame: bool) -> Record:
        record, count, height, width, text_at, length, note_at, note_length, sample_id = [
            column[row] for column in self._columns
        ]
        check = self._checks(row)
        frames = range(count) if frames is None else frames
        assert frames.step == 1 and 0 <= frames.start < frames.stop <= count, (frames, count)
        shape = (len(frames), height, width, self._channels)
        frame_bytes = height * width * self._cell_bytes
        start = record + RECORD_HEADER.size + frames.start * frame_bytes
        hashes_at = aligned(note_at + note_length)
        behind = hashes_at + 8 * count - note_at if check else note_length
        spans = (start, len(frames) * frame_bytes), (text_at, length * self._token_bytes), (note_at, behind)
        source = self.source.gathered(spans)
        if check:
            source.check_size()
        latents = self._tensor(source, start, shape, self._dtypes[0])
        text = self._tensor(source, text_at, (length, *self._text_shape), self._dtypes[1])
        note = source.view(note_at, note_length).tobytes()
        if check:
            check_values(
                self.index, row, self.where(row), frames, latents, text, note, source.view(hashes_at, 8 * count)
            )
            if self.verify == "once":
                self._seen[row] |= len(frames) == count and (first_frame or not self.index.encoder.first_frame)
        return Record(latents, text, sample_id, note, self._first_frame(row, check) if first_frame else None)

    def metadata(self, row: int) -> dict[str, Any]:
        """Return the metadata of record `row`; of the .bin nothing else is read.

        Raises:
            DataError: they are damaged; names the sample.
        """
        columns, check = self.index.columns, self._checks(row)
        start, length = int(columns["metadata_offset"][row]), int(columns["metadata_length"][row])
        try:
            if check:
                self.source.check_size()
            note = self.source.view(start, length).tobytes()
            if check and digest(note) != int(columns["metadata_hash"][row]):
                raise DataError(self._damaged(row, "the metadata"))
            return load_json(note, f"metadata of sample {int(columns['sample_id'][row])}")
        except DataError as error:
            raise self._named(row, error) from error

    def _first_frame(self, row: int, check: bool) -> torch.Tensor | None:
        """Return the pixels uint8 `[H, W, 3]` of a record, if it has any."""
        if not self.index.encoder.first_frame:
            return None
        start, height, width, stored = (int(self.index.columns[name][row]) for name in IMAGE_COLUMNS)
        if not start:
            return None
        image = self._tensor(self.source, start, (height, width, IMAGE_CHANNELS), torch.uint8)
        if check and digest(bytes_of(image)) != stored:
            raise DataError(self._damaged(row, "the first frame"))
        return image

    def record_in(self, allocate: Allocate, row: int, frames: range | None, first_frame: bool = False) -> Record:
        """Return record `row` in memory of the caller, see `IndexedDataset.sample_in`."""
        try:
            return self._placed(allocate, row, frames, first_frame)
        except DataError as error:
            raise self._named(row, error) from error

    def _placed(self, allocate: Allocate, row: int, frames: range | None, first_frame: bool) -> Record:
        _, count, height, width, _, length, note_at, note_length, sample_id = [column[row] for column in self._columns]
        shape = (count if frames is None else len(frames), height, width, self._channels)
        latent_bytes, text_bytes = math.prod(shape[:3]) * self._cell_bytes, length * self._token_bytes
        memory, text_at = allocate(aligned(latent_bytes) + aligned(text_bytes)), aligned(latent_bytes)
        latents = _at(memory, 0, shape, self._dtypes[0])
        text = _at(memory, text_at, (length, *self._text_shape), self._dtypes[1])
        if not isinstance(self.source, MappedSource):  # it would be asked twice
            record = self.record(row, frames, first_frame)
            latents.copy_(record.latents), text.copy_(record.text)
            image, note = record.first_frame, record.metadata_json
        else:
            check = self._checks(row)
            self.copy(row, frames, memory.numpy())
            image = self._first_frame(row, check) if first_frame else None
            note = self.source.view(note_at, note_length).tobytes()
        if image is not None:
            image = allocate(image.numel()).view(image.shape).copy_(image)
        return Record(latents, text, sample_id, note, image)

    def check_record_header(self, row: int) -> None:
        """Check that the record's own header agrees with the index.

        Raises:
            DataError: it is damaged or says something else.
        """
        self.source.check_size()
        check_record_header(self.source, self.index, row, self.where(row))

    def _tensor(self, source: Source, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return values of the .bin: a view of the mapping, or of what was read."""
        length = math.prod(shape)
        if not length:
            return torch.empty(shape, dtype=dtype)
        size = dtype.itemsize
        if not isinstance(source, MappedSource):
            return torch.from_numpy(source.view(start, length * size)).view(dtype).view(shape)
        values = self._mapped.get(dtype)
        if values is None:
            values = torch.from_numpy(source.data[: len(source.data) // size * size]).view(dtype)
            self._mapped[dtype] = values
        return values[start // size : start // size + length].view(shape)

    def _checks(self, row: int) -> bool:
        return self.verify == "always" or (self.verify == "once" and not self._seen[row])

    def _named(self, row: int, error: DataError) -> DataError:
        """Return `error` with the sample's name, which the sources of bytes don't know."""
        where = self.where(row)
        return error if str(error).startswith(where) else DataError(f"{where}: {error}")

    def where(self, row: int) -> str:
        """Name record `row`: file, sample id and place."""
        return f"{self.path}: sample {int(self.index.columns['sample_id'][row])} (record {row})"

    def _damaged(self, row: int, what: str) -> str:
        return damaged(self.where(row), what)


def _at(memory: torch.Tensor, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return values that lie `start` bytes into `memory`, uint8 and contiguous."""
    return memory[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
