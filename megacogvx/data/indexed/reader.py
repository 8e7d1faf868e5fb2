"""IndexedDataset: records of a dataset as torch tensors that view the mapped files, without a copy.

Shapes and offsets come from the index columns alone. Tensors keep their mapping alive, so they may outlive the dataset;
writing into one changes a private copy of the page, never the file. On network file systems `pread` copies instead: a
file that is cut or a server that hangs is then an error of one read, not of the process. A dataset at a URL is read by
range requests (`remote.py`), its indexes once, when it is opened.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from megacogvx.data.indexed.copying import RecordCopier
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
    aligned,
    check_index_rows,
    check_version,
    digest,
    load_json,
    unseal,
)
from megacogvx.data.indexed.manifest import MANIFEST, Manifest, ShardEntry, differing_keys, read_index, read_manifest
from megacogvx.data.indexed.remote import Folder, RemotePath, folder_at
from megacogvx.data.indexed.side_columns import read_side_column
from megacogvx.data.indexed.source import Access, MappedSource, Source, open_source
from megacogvx.errors import DataError

Verify = Literal["always", "once", "never"]
Allocate = Callable[[int], torch.Tensor]  # bytes -> uint8 `[bytes]`, contiguous
OPENED_AT_ONCE = 16  # indexes that are fetched side by side from an object store
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
        self._check_header()
        self.access = access
        self._columns = [self.index.columns[name].data for name in READ_COLUMNS]
        encoder = self.index.encoder
        self._dtypes = field_dtype(encoder.latent_dtype), field_dtype(encoder.text_dtype)
        self._seen = np.zeros(len(self.index) if verify == "once" else 0, bool)

    @cached_property
    def source(self) -> Source:
        """The bytes of the .bin.

        Raises:
            DataError: a row of the index is impossible, or the file can't be opened.
        """
        check_index_rows(self.index, str(self.path.with_suffix(".idx") if isinstance(self.path, Path) else self.path))
        return open_source(self.path, self.index.bin_bytes, self.access)

    @cached_property
    def copier(self) -> RecordCopier:
        """What copies records into the caller's memory."""
        return RecordCopier(self.index, self.source, lambda row, what: DataError(self._damaged(row, what)))

    def copy(self, row: int, frames: range | None, out: np.ndarray) -> int:
        """Copy record `row`, see `IndexedDataset.read_into`."""
        check = self._checks(row)
        if not check and frames is None:
            return self.copier.whole(row, out)
        end = self.copier.frames(row, frames, out, check)
        if check and self.verify == "once":
            whole = frames is None or len(frames) == self.index.columns["frames"][row]
            self._seen[row] |= whole and not self.index.encoder.first_frame
        return end

    def record(self, row: int, frames: range | None = None, first_frame: bool = False) -> Record:
        """Return record `row`, or the latent frames `frames` of it; with its first frame's pixels if asked for.

        Raises:
            DataError: the file is shorter than it was, or bytes differ from their checksum.
        """
        record, count, height, width, text_at, length, note_at, note_length, sample_id = [
            column[row] for column in self._columns
        ]
        check = self._checks(row)
        frames = range(count) if frames is None else frames
        assert frames.step == 1 and 0 <= frames.start < frames.stop <= count, (frames, count)
        encoder = self.index.encoder
        shape = (len(frames), height, width, 2 * encoder.latent_channels)
        frame_bytes = height * width * encoder.frame_cell_bytes
        start = record + RECORD_HEADER.size + frames.start * frame_bytes
        spans = (start, len(frames) * frame_bytes), (text_at, length * encoder.text_token_bytes), (note_at, note_length)
        source = self.source.gathered(spans)
        if check:
            source.check_size()
        latents = _tensor(source, start, shape, self._dtypes[0])
        text = _tensor(source, text_at, (length, *encoder.text_shape), self._dtypes[1])
        note = source.view(note_at, note_length).tobytes()
        if check:
            self._check(row, frames, latents, text, note)
            if self.verify == "once":
                self._seen[row] |= len(frames) == count and (first_frame or not encoder.first_frame)
        return Record(latents, text, sample_id, note, self._first_frame(row, check) if first_frame else None)

    def _first_frame(self, row: int, check: bool) -> torch.Tensor | None:
        """Return the pixels uint8 `[H, W, 3]` of a record, if it has any."""
        if not self.index.encoder.first_frame:
            return None
        start, height, width, stored = (int(self.index.columns[name][row]) for name in IMAGE_COLUMNS)
        if not start:
            return None
        image = _tensor(self.source, start, (height, width, IMAGE_CHANNELS), torch.uint8)
        if check and digest(_view(image)) != stored:
            raise DataError(self._damaged(row, "the first frame"))
        return image

    def record_in(self, allocate: Allocate, row: int, frames: range | None, first_frame: bool = False) -> Record:
        """Return record `row` in memory of the caller, see `IndexedDataset.sample_in`."""
        _, count, height, width, _, length, note_at, note_length, sample_id = [column[row] for column in self._columns]
        encoder = self.index.encoder
        shape = (count if frames is None else len(frames), height, width, 2 * encoder.latent_channels)
        latent_bytes, text_bytes = math.prod(shape[:3]) * encoder.frame_cell_bytes, length * encoder.text_token_bytes
        memory, text_at = allocate(aligned(latent_bytes) + aligned(text_bytes)), aligned(latent_bytes)
        latents = memory[:latent_bytes].view(self._dtypes[0]).view(shape)
        text = memory[text_at : text_at + text_bytes].view(self._dtypes[1]).view(length, *encoder.text_shape)
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
        columns = self.index.columns
        start, where = int(columns["record"][row]), self._where(row)
        self.source.check_size()
        header = self.source.view(start, RECORD_HEADER.size).tobytes()
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
        header = self.source.view(start - IMAGE_HEADER.size, IMAGE_HEADER.size).tobytes()
        _, *found = unseal(IMAGE_HEADER, header, IMAGE_MAGIC, f"{where}: first frame")
        height, width, pixels, number = (
            int(self.index.columns[name][row]) for name in ("image_height", "image_width", "image_hash", "sample_id")
        )
        if found != [height, width, IMAGE_CHANNELS, number, pixels]:
            raise DataError(f"{where}: the header of its first frame disagrees with the index")

    def _check_header(self) -> None:
        if isinstance(self.path, RemotePath):
            header = self.path.read_range(0, BIN_HEADER.size)
        else:
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

    def _check(self, row: int, frames: range, latents: torch.Tensor, text: torch.Tensor, note: bytes) -> None:
        columns, first = self.index.columns, int(self.index.frame_start[row])
        for values, frame in zip(latents, frames, strict=True):
            if digest(_view(values)) != int(columns["frame_hash"][first + frame]):
                raise DataError(self._damaged(row, f"latent frame {frame}"))
        if digest(_view(text)) != int(columns["text_hash"][row]):
            raise DataError(self._damaged(row, "the text"))
        if digest(note) != int(columns["metadata_hash"][row]):
            raise DataError(self._damaged(row, "the metadata"))

    def _checks(self, row: int) -> bool:
        return self.verify == "always" or (self.verify == "once" and not self._seen[row])

    def _where(self, row: int) -> str:
        return f"{self.path}: sample {int(self.index.columns['sample_id'][row])} (record {row})"

    def _damaged(self, row: int, what: str) -> str:
        return f"{self._where(row)}: {what} is damaged (its checksum differs); restore the file from a copy"


class IndexedDataset:
    """A finished dataset: `len`, columns, and records by number in manifest order.

    Attributes:
        manifest: its manifest; `manifest.encoder` says what made the records.
    """

    def __init__(self, folder: Folder | str, verify: Verify = "always", access: Access = "mmap") -> None:
        """Open the dataset in `folder`, a path or a URL; reads only the indexes.

        Args:
            folder: that holds manifest.json.
            verify: compare checksums at every read, at the first read of each sample, or never.
            access: map the files, or read from them; files at a URL are always read.

        Raises:
            DataError: a file is missing, truncated, damaged or doesn't belong here.
        """
        self.folder, self.verify = folder_at(folder), verify
        self.manifest: Manifest = read_manifest(self.folder)
        self.shards = self._open_shards(access)
        for shard in self.shards:
            differing = differing_keys(self.encoder, shard.index.encoder)
            if differing:
                raise DataError(
                    f"{self.folder}: {MANIFEST} and shard {shard.name} name different encoders: {differing}"
                )
        self._starts = np.cumsum([0, *(len(shard.index) for shard in self.shards)]).tolist()

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def encoder(self) -> EncoderInfo:
        """What made the records."""
        return self.manifest.encoder

    @cached_property
    def sample_id(self) -> np.ndarray:
        """Keys of the samples, uint64 `[n]`."""
        return self._column("sample_id", np.uint64)

    @cached_property
    def frames(self) -> np.ndarray:
        """Latent frames of the samples, int64 `[n]`."""
        return self._column("frames", np.int64)

    @cached_property
    def height(self) -> np.ndarray:
        """Latent rows of the samples, int64 `[n]`."""
        return self._column("height", np.int64)

    @cached_property
    def width(self) -> np.ndarray:
        """Latent columns of the samples, int64 `[n]`."""
        return self._column("width", np.int64)

    @cached_property
    def text_length(self) -> np.ndarray:
        """Text tokens of the samples, int64 `[n]`."""
        return self._column("text_length", np.int64)

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

    def first_frame_sizes(self) -> np.ndarray:
        """Return height and width of the first frames in pixels, int64 `[2, n]`; zeros where there is none."""
        if not self.encoder.first_frame:
            return np.zeros((2, len(self)), np.int64)
        return np.stack([self._column(name, np.int64) for name in ("image_height", "image_width")])

    def sample_in(
        self, allocate: Allocate, number: int, frames: range | None = None, first_frame: bool = False
    ) -> Record:
        """Return `sample(number, frames, first_frame)` in memory that `allocate` gives, pinned say: one copy.

        Raises:
            DataError: the sample is damaged; names its shard and id.
        """
        shard, row = self.locate(number)
        return shard.record_in(allocate, row, frames, first_frame)

    def read_into(self, number: int, out: np.ndarray, frames: range | None = None) -> int:
        """Copy sample `number` into `out`: latents from byte 0 on, text from the next multiple of 64; the fast way.

        The sizes are those of the columns `frames`, `height`, `width`, `text_length`; nothing else is returned.

        Args:
            number: of the sample.
            out: uint8 `[n]`, contiguous and large enough; `tensor.view(torch.uint8).numpy()` of a pinned tensor, say.
            frames: limits the latents to these latent frames.

        Returns:
            Bytes of `out` that are taken, a multiple of 64.

        Raises:
            DataError: the sample is damaged; names its shard and id. `out` may hold a part of it then.
        """
        shard, row = self.locate(number)
        return shard.copy(row, frames, out)

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

    def _open_shards(self, access: Access) -> list[Shard]:
        def open_shard(entry: ShardEntry) -> Shard:
            return Shard(self.folder, entry.name, self.verify, entry, access)

        if isinstance(self.folder, Path):
            return [open_shard(entry) for entry in self.manifest.shards]
        with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
            return list(pool.map(open_shard, self.manifest.shards))

    def _column(self, name: str, dtype: type) -> np.ndarray:
        columns: list[np.ndarray] = [shard.index.columns[name].astype(dtype) for shard in self.shards]
        return np.concatenate([np.empty(0, dtype), *columns])


def _tensor(source: Source, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return values of the .bin: a view of the mapping, or of what was read."""
    length = math.prod(shape) * dtype.itemsize
    if not length:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(source.view(start, length)).view(dtype).view(shape)


def _view(values: torch.Tensor) -> np.ndarray:
    return values.reshape(-1).view(torch.uint8).numpy()
