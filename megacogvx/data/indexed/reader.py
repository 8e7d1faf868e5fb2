"""IndexedDataset: records of a dataset as torch tensors that view the mapped files, without a copy.

Shapes and offsets come from the index columns alone. Tensors keep their mapping alive, so they may outlive the dataset;
writing into one changes a private copy of the page, never the file. On network file systems `pread` copies instead: a
file that is cut or a server that hangs is then an error of one read, not of the process.
"""

from __future__ import annotations

import math
import mmap
import os
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch

from megacogvx.data.indexed.fields import field_dtype
from megacogvx.data.indexed.layout import (
    BIN_HEADER,
    BIN_MAGIC,
    IMAGE_CHANNELS,
    IMAGE_COLUMNS,
    IMAGE_HEADER,
    IMAGE_MAGIC,
    IMAGE_RECORD_MAGIC,
    RECORD_HEADER,
    RECORD_MAGIC,
    EncoderInfo,
    ShardIndex,
    check_version,
    digest,
    load_json,
    unseal,
)
from megacogvx.data.indexed.manifest import MANIFEST, Manifest, ShardEntry, differing_keys, read_index, read_manifest
from megacogvx.data.indexed.side_columns import read_side_column
from megacogvx.errors import DataError

Verify = Literal["always", "once", "never"]
Access = Literal["mmap", "pread"]
READ_COLUMNS = (
    "record", "frames", "height", "width", "text_offset", "text_length", "metadata_offset", "metadata_length",
    "sample_id",
)  # fmt: skip


@dataclass(frozen=True)
class Record:
    """One sample as stored.

    Attributes:
        latents: posterior moments `[T, h, w, 2C]`, or the frames that were asked for; of `encoder.latent_dtype`.
        text: text embedding `[L, E]`, or token ids `[L]`; of `encoder.text_dtype`.
        sample_id: 64-bit key.
        metadata_json: the metadata as stored; `metadata` parses them.
        first_frame: pixels uint8 `[H, W, 3]`; None if the sample has none, or they weren't asked for.
    """

    latents: torch.Tensor
    text: torch.Tensor
    sample_id: int
    metadata_json: bytes
    first_frame: torch.Tensor | None = None

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata; parsed at each access, since a training run never looks."""
        return load_json(self.metadata_json, f"metadata of sample {self.sample_id}")


class Shard:
    """One shard: its index, and its .bin mapped at the first read."""

    def __init__(
        self, folder: Path, name: str, verify: Verify = "always", entry: ShardEntry | None = None,
        access: Access = "mmap",
    ) -> None:  # fmt: skip
        """Read NAME.idx and check that it belongs to NAME.bin and to the manifest's `entry`.

        Raises:
            DataError: a file is missing, damaged, or of another shard.
        """
        self.path, self.name, self.verify = folder / f"{name}.bin", name, verify
        self.index: ShardIndex = read_index(folder, name, check_columns=verify != "never")
        if entry is not None and (entry.idx_checksum, entry.uuid, entry.samples) != (
            f"{self.index.checksum:016x}", self.index.uuid.hex(), len(self.index),
        ):  # fmt: skip
            raise DataError(
                f"{folder / name}.idx isn't the one that {MANIFEST} lists; run finish_dataset if it was rewritten"
            )
        self._check_header()
        self.access = access
        self._mapping: mmap.mmap | None = None
        self._values: dict[torch.dtype, torch.Tensor] = {}  # the mapping as values of a dtype
        self._file: BinaryIO | None = None
        self._columns = [self.index.columns[name] for name in READ_COLUMNS]
        encoder = self.index.encoder
        self._dtypes = field_dtype(encoder.latent_dtype), field_dtype(encoder.text_dtype)
        self._seen = np.zeros(len(self.index), bool)

    def record(self, row: int, frames: range | None = None, first_frame: bool = False) -> Record:
        """Return record `row`, or the latent frames `frames` of it; with its first frame's pixels if asked for.

        Raises:
            DataError: the file is shorter than it was, or bytes differ from their checksum.
        """
        record, count, height, width, text_at, length, note_at, note_length, sample_id = [
            int(column[row]) for column in self._columns
        ]
        check = self.verify == "always" or (self.verify == "once" and not self._seen[row])
        frames = range(count) if frames is None else frames
        assert frames.step == 1 and 0 <= frames.start < frames.stop <= count, (frames, count)
        encoder = self.index.encoder
        shape = (len(frames), height, width, 2 * encoder.latent_channels)
        frame_bytes = height * width * encoder.frame_cell_bytes
        text_shape = (length, *encoder.text_shape)
        if check and self.access == "mmap":
            self._check_size()
        start = record + RECORD_HEADER.size + frames.start * frame_bytes
        latents, text = self._tensor(start, shape, self._dtypes[0]), self._tensor(text_at, text_shape, self._dtypes[1])
        note = self._bytes(note_at, note_length)
        image = self._first_frame(row) if first_frame else None
        if check:
            self._check(row, frames, latents, text, note)
            if image is not None and digest(_view(image)) != int(self.index.columns["image_hash"][row]):
                raise DataError(self._damaged(row, "the first frame"))
            self._seen[row] |= len(frames) == count and (first_frame or not encoder.first_frame)
        return Record(latents, text, sample_id, note, image)

    def _first_frame(self, row: int) -> torch.Tensor | None:
        """Return the pixels uint8 `[H, W, 3]` of a record, if it has any."""
        if not self.index.encoder.first_frame:
            return None
        start, height, width, _ = (int(self.index.columns[name][row]) for name in IMAGE_COLUMNS)
        return self._tensor(start, (height, width, IMAGE_CHANNELS), torch.uint8) if start else None

    def check_record_header(self, row: int) -> None:
        """Check that the record's own header agrees with the index.

        Raises:
            DataError: it is damaged or says something else.
        """
        columns = self.index.columns
        start, where = int(columns["record"][row]), self._where(row)
        self._check_size()
        header = self._bytes(start, RECORD_HEADER.size)
        has_image = self.index.encoder.first_frame and columns["image_offset"][row] > 0
        magic = IMAGE_RECORD_MAGIC if has_image else RECORD_MAGIC
        _, frames, height, width, channels, *rest, note_hash, number = unseal(RECORD_HEADER, header, magic, where)
        names = ("frames", "height", "width", "text_length", "sample_id", "text_offset", "text_hash", "metadata_length")
        expected = [int(columns[name][row]) for name in names]
        expected_channels = 2 * self.index.encoder.latent_channels
        good_note = note_hash in (0, int(columns["metadata_hash"][row]) % 2**32)
        if [frames, height, width, *rest, number] != [*expected, row] or channels != expected_channels or not good_note:
            raise DataError(f"{where}: the record's header disagrees with the index")
        if has_image:
            self._check_image_header(row, where)

    def _check_image_header(self, row: int, where: str) -> None:
        start = int(self.index.columns["image_offset"][row])
        header = self._bytes(start - IMAGE_HEADER.size, IMAGE_HEADER.size)
        _, *found = unseal(IMAGE_HEADER, header, IMAGE_MAGIC, f"{where}: first frame")
        height, width, pixels, number = (
            int(self.index.columns[name][row]) for name in ("image_height", "image_width", "image_hash", "sample_id")
        )
        if found != [height, width, IMAGE_CHANNELS, number, pixels]:
            raise DataError(f"{where}: the header of its first frame disagrees with the index")

    def _check_header(self) -> None:
        with self.path.open("rb") as file:
            header = file.read(BIN_HEADER.size)
        _, major, minor, _, uuid, *fields = unseal(BIN_HEADER, header, BIN_MAGIC, str(self.path))
        check_version(major, minor, str(self.path))
        if uuid != self.index.uuid:
            raise DataError(
                f"{self.path} has uuid {uuid.hex()}, the .idx beside it {self.index.uuid.hex()}: they are of two shards"
            )
        if tuple(fields) != self.index.encoder.bin_header_values:
            raise DataError(
                f"{self.path} holds (channels, text width, dtype codes) {fields}, its index says otherwise: "
                f"{list(self.index.encoder.bin_header_values)}"
            )

    def _tensor(self, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return values of the .bin: a view of the mapping, or read into memory of their own."""
        count = math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype)
        if self.access == "pread":
            return torch.frombuffer(self._read(start, count * dtype.itemsize), dtype=dtype).view(shape)
        values = self._values.get(dtype)
        if values is None:
            usable = self.index.bin_bytes // dtype.itemsize
            values = self._values[dtype] = torch.frombuffer(self._mapped(), dtype=dtype, count=usable)
        start //= dtype.itemsize  # fields are aligned to 64 bytes
        return values[start : start + count].view(shape)

    def _bytes(self, start: int, length: int) -> bytes:
        return self._mapped()[start : start + length] if self.access == "mmap" else bytes(self._read(start, length))

    def _read(self, start: int, length: int) -> bytearray:
        """Read bytes of the .bin.

        Raises:
            DataError: the file ends before, or can't be read.
        """
        buffer, done = bytearray(length), 0
        view = memoryview(buffer)
        try:
            if self._file is None:
                self._file = self.path.open("rb", buffering=0)
            while done < length:
                count = os.preadv(self._file.fileno(), [view[done:]], start + done)
                if not count:
                    raise DataError(f"{self.path} ends at byte {start + done}, {start + length} are needed: truncated")
                done += count
        except OSError as error:
            raise DataError(f"{self.path} can't be read at byte {start}: {error.strerror}") from None
        return buffer

    def _mapped(self) -> mmap.mmap:
        if self._mapping is None:
            with self.path.open("rb") as file:
                self._mapping = mmap.mmap(
                    file.fileno(), self.index.bin_bytes, mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0),
                    mmap.PROT_READ | mmap.PROT_WRITE,
                )  # fmt: skip
        return self._mapping

    def _check_size(self) -> None:
        """Reading a mapped page beyond the end of a file that was cut is SIGBUS, so look first."""
        size = os.stat(self.path).st_size
        if size < self.index.bin_bytes:
            raise DataError(f"{self.path} has shrunk from {self.index.bin_bytes} to {size} bytes while in use")

    def _check(self, row: int, frames: range, latents: torch.Tensor, text: torch.Tensor, note: bytes) -> None:
        columns, first = self.index.columns, int(self.index.frame_start[row])
        for values, frame in zip(latents, frames, strict=True):
            if digest(_view(values)) != int(columns["frame_hash"][first + frame]):
                raise DataError(self._damaged(row, f"latent frame {frame}"))
        if digest(_view(text)) != int(columns["text_hash"][row]):
            raise DataError(self._damaged(row, "the text"))
        if digest(note) != int(columns["metadata_hash"][row]):
            raise DataError(self._damaged(row, "the metadata"))

    def _where(self, row: int) -> str:
        return f"{self.path}: sample {int(self.index.columns['sample_id'][row])} (record {row})"

    def _damaged(self, row: int, what: str) -> str:
        return f"{self._where(row)}: {what} is damaged (its checksum differs); restore the file from a copy"


class IndexedDataset:
    """A finished dataset: `len`, columns, and records by number in manifest order.

    Attributes:
        manifest: its manifest; `manifest.encoder` says what made the records.
        sample_id, frames, height, width, text_length: int64 (ids: uint64) arrays `[n]`; latent cells and tokens.
    """

    def __init__(self, folder: Path | str, verify: Verify = "always", access: Access = "mmap") -> None:
        """Open the dataset in `folder`; reads only the indexes.

        Args:
            verify: compare checksums at every read, at the first read of each sample, or never.
            access: map the files, or read from them.

        Raises:
            DataError: a file is missing, truncated, damaged or doesn't belong here.
        """
        self.folder, self.verify = Path(folder), verify
        self.manifest: Manifest = read_manifest(self.folder)
        self.shards = [Shard(self.folder, entry.name, verify, entry, access) for entry in self.manifest.shards]
        for shard in self.shards:
            differing = differing_keys(self.encoder, shard.index.encoder)
            if differing:
                raise DataError(
                    f"{self.folder}: {MANIFEST} and shard {shard.name} name different encoders: {differing}"
                )
        self._starts = np.cumsum([0, *(len(shard.index) for shard in self.shards)]).tolist()
        self.sample_id = self._column("sample_id", np.uint64)
        self.frames, self.height, self.width, self.text_length = (
            self._column(name, np.int64) for name in ("frames", "height", "width", "text_length")
        )

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def encoder(self) -> EncoderInfo:
        """What made the records."""
        return self.manifest.encoder

    def sample(self, number: int, frames: range | None = None, first_frame: bool = False) -> Record:
        """Return sample `number`; `frames` limits the latents to these latent frames (and to their bytes on disk).

        The pixels of the first frame are read only where `first_frame` asks for them.

        Raises:
            DataError: the sample is damaged; names its shard and id.
        """
        shard, row = self.locate(number)
        return shard.record(row, frames, first_frame)

    def has_first_frame(self) -> np.ndarray:
        """Return which samples hold their first frame: bool `[n]`."""
        if not self.encoder.first_frame:
            return np.zeros(len(self), bool)
        return self._column("image_offset", np.uint64) > 0

    def side_column(self, name: str) -> np.ndarray:
        """Return the newest generation of a side column: float32 `[n]`, NaN where a sample has no value.

        Raises:
            DataError: there is none of this name, it is damaged, or of other samples.
        """
        return read_side_column(self.folder, name, self.sample_id)

    def locate(self, number: int) -> tuple[Shard, int]:
        """Return the shard that holds sample `number`, and its row there."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)} in {self.folder}")
        place = bisect_right(self._starts, number) - 1
        return self.shards[place], number - self._starts[place]

    def _column(self, name: str, dtype: type) -> np.ndarray:
        columns: list[np.ndarray] = [shard.index.columns[name].astype(dtype) for shard in self.shards]
        return np.concatenate([np.empty(0, dtype), *columns])


def _view(values: torch.Tensor) -> np.ndarray:
    return values.reshape(-1).view(torch.uint8).numpy()
