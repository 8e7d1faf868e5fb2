"""DatasetWriter: one process writes one shard, record after record, and commits it at the end.

Records go to NAME.bin.tmp; `finalize` syncs it and renames it to NAME.bin, then does the same with the .idx, which is
the commit mark. What a killed writer leaves (*.tmp, a .bin without .idx) the next writer of the same shard replaces; a
restarted job skips the shards that are finished. Many processes write one dataset, each its own shard, without talking.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Collection
from pathlib import Path
from re import fullmatch
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch
import xxhash

from megacogvx.data.indexed.durable import sync_folder, try_lock, write_atomically, writing
from megacogvx.data.indexed.encoder_info import EncoderInfo
from megacogvx.data.indexed.layout import (
    BIN_HEADER,
    BIN_MAGIC,
    COLUMNS,
    IMAGE_COLUMNS,
    IMAGE_HEADER,
    IMAGE_MAGIC,
    IMAGE_RECORD_MAGIC,
    MAJOR,
    MINOR,
    RECORD_HEADER,
    RECORD_MAGIC,
    aligned,
    columns_of,
    digest,
    sealed,
    sealed_hashes,
    write_index,
)
from megacogvx.data.indexed.manifest import SHARD_NAME, differing_keys, read_index
from megacogvx.data.indexed.sample_rules import check_sample, encode_metadata
from megacogvx.errors import DataError


def shard_name(number: int) -> str:
    """Return the usual name of shard `number`."""
    return f"shard-{number:05d}"


class DatasetWriter:
    """Writes one shard of a dataset.

    Attributes:
        finished: the shard is complete; true from the start if an earlier run wrote it.

    Used as a context manager it drops the unfinished shard when the block fails; `finalize` stays explicit.
    """

    def __init__(self, folder: Path | str, encoder: EncoderInfo, shard: str | int = 0) -> None:
        """Open shard `shard` (a name, or a number for `shard-00000`) in `folder`, which is made if needed.

        Raises:
            DataError: the name isn't allowed, another process is writing this shard, or a finished one of this name is
                damaged or of another encoder, or nothing can be written there.
        """
        self.folder, self.encoder = Path(folder), encoder
        self.name = shard_name(shard) if isinstance(shard, int) else shard
        if not fullmatch(SHARD_NAME, self.name):
            raise DataError(f"shard name {self.name!r} must match {SHARD_NAME}")
        self.finished = False
        self._columns: dict[str, list[int]] = {name: [] for name in columns_of(encoder)}
        self._ids: set[int] = set()
        self._texts: dict[bytes, int] = {}  # 128-bit hash of a stored text -> its offset
        self._file: BinaryIO | None = None
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / f"{self.name}.idx").exists():
            self._adopt_finished()
        else:
            with writing(self.folder):
                self._open()

    def __len__(self) -> int:
        return len(self._ids)

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self.abort()

    def add_item(
        self, *, latents: torch.Tensor, text: torch.Tensor, sample_id: int, metadata: dict[str, Any],
        first_frame: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """Append one record.

        Args:
            latents: posterior moments `[T, h, w, 2C]` on the CPU, mean then log-variance, of `encoder.latent_dtype`.
            text: text embedding `[L, E]`, or ids `[L]`, on the CPU, of `encoder.text_dtype`; stored once per shard for
                equal captions.
            sample_id: 64-bit key of the sample, unique in the dataset.
            metadata: JSON-able facts about the sample (source, caption, fps, scores ...), at most 1 MiB.
            first_frame: pixels uint8 `[H, W, 3]` on the CPU, where `encoder.first_frame` allows it.

        Raises:
            DataError: a shape, dtype or value doesn't fit the dataset, the id is taken, or the disk is full.
        """
        assert self._file is not None, f"shard {self.name} is finished or dropped"
        check_sample(self.encoder, latents, text, sample_id, first_frame)
        if sample_id in self._ids:
            raise DataError(f"sample {sample_id} is in shard {self.name} already; ids are unique in a dataset")
        note = encode_metadata(metadata, sample_id)
        latent_data, text_data = _bytes_of(latents), _bytes_of(text)
        start = self._file.tell()
        text_key, text_hash = xxhash.xxh3_128_digest(text_data), digest(text_data)
        own_text_at = aligned(start + RECORD_HEADER.size + len(latent_data))
        text_at = self._texts.get(text_key, own_text_at)
        own_text = text_at == own_text_at
        note_at = aligned(own_text_at + len(text_data)) if own_text else own_text_at
        magic = RECORD_MAGIC if first_frame is None else IMAGE_RECORD_MAGIC
        header = sealed(
            RECORD_HEADER, magic, *latents.shape, len(text), sample_id, text_at, text_hash, len(note),
            digest(note) % 2**32, len(self),
        )  # fmt: skip
        frame = len(latent_data) // len(latents)
        hashes = sealed_hashes([digest(latent_data[i : i + frame]) for i in range(0, len(latent_data), frame)])
        image = memoryview(b"") if first_frame is None else _bytes_of(first_frame)
        image_header = b"" if first_frame is None else _image_header(first_frame, image, sample_id)
        try:
            for piece in (header, latent_data, text_data if own_text else b"", note, hashes, image_header, image):
                self._file.write(piece)
                self._file.write(bytes(aligned(self._file.tell()) - self._file.tell()))
        except OSError as error:
            raise self._failed(error) from error
        self._texts[text_key] = text_at
        self._ids.add(sample_id)
        entry = (
            sample_id, start, *latents.shape[:3], text_at, len(text), text_hash, note_at, len(note), digest(note),
            digest(hashes[:-8]),
        )  # fmt: skip
        for name, value in zip(COLUMNS, entry, strict=True):
            self._columns[name].append(value)
        if self.encoder.first_frame:
            image_at = aligned(aligned(note_at + len(note)) + len(hashes)) + IMAGE_HEADER.size
            image_entry = (0, 0, 0, 0) if first_frame is None else (image_at, *first_frame.shape[:2], digest(image))
            for name, value in zip(IMAGE_COLUMNS, image_entry, strict=True):
                self._columns[name].append(value)

    def finalize(self) -> None:
        """Make the shard durable and visible; a finished one stays as it is.

        Raises:
            DataError: the disk is full or fails; the shard isn't there then.
        """
        if self.finished:
            return
        assert self._file is not None, f"shard {self.name} was dropped"
        final = self.folder / f"{self.name}.bin"
        try:
            bin_bytes = self._file.tell()
            self._file.flush()
            os.fsync(self._file.fileno())
            dtypes = columns_of(self.encoder)
            columns = {name: np.array(values, dtype=dtypes[name]) for name, values in self._columns.items()}
            index = write_index(self._uuid, self.encoder, bin_bytes, columns)
            self._temporary.replace(final)
            sync_folder(self.folder)
            write_atomically(self.folder / f"{self.name}.idx", index)
        except OSError as error:
            raise self._failed(error) from error
        self._file.close()
        self._file, self.finished = None, True

    def abort(self) -> None:
        """Drop the unfinished shard and its temporary file."""
        if self._file is not None:
            self._temporary.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # closing writes what is buffered; on a full disk that fails again
                self._file.close()
            self._file = None

    def check_finished(self, sample_ids: Collection[int]) -> None:
        """Check that a shard that was found finished is the one that would be written now.

        Raises:
            DataError: it holds other samples: another command wrote it.
        """
        if self._ids != set(sample_ids):
            raise DataError(
                f"shard {self.name} of {self.folder} is there already and holds {len(self)} samples, others than the "
                f"{len(sample_ids)} that belong there: another command began this folder; remove it, or name a new one"
            )

    @property
    def _temporary(self) -> Path:
        return self.folder / f"{self.name}.bin.tmp"

    def _adopt_finished(self) -> None:
        index = read_index(self.folder, self.name)
        differing = differing_keys(index.encoder, self.encoder)
        if differing:
            raise DataError(
                f"shard {self.name} of {self.folder} exists and comes from another encoder: {differing}; write to "
                "another folder"
            )
        self._ids = set(index.columns["sample_id"].tolist())
        self.finished = True

    def _open(self) -> None:
        file = self._temporary.open("ab")  # not "wb": another writer's file must survive until we hold the lock
        if not try_lock(file) or not self._is_temporary(file):
            file.close()
            raise DataError(f"another process is writing shard {self.name} of {self.folder}; give each its own")
        file.truncate(0)
        file.seek(0)
        self._file, self._uuid = file, uuid.uuid4().bytes
        fields = self.encoder.bin_header_values
        file.write(sealed(BIN_HEADER, BIN_MAGIC, MAJOR, MINOR, BIN_HEADER.size, self._uuid, *fields))

    def _is_temporary(self, file: BinaryIO) -> bool:
        """Whether the open file still is the temporary one; not if another writer committed it since we opened it."""
        return self._temporary.exists() and os.path.samestat(os.fstat(file.fileno()), self._temporary.stat())

    def _failed(self, error: OSError) -> DataError:
        written = self._temporary.stat().st_size if self._temporary.exists() else 0
        return DataError(
            f"cannot write shard {self.name} of {self.folder} ({written} bytes so far): {error.strerror}; free some "
            "space and start again: finished shards are kept"
        )


def _image_header(image: torch.Tensor, pixels: memoryview, sample_id: int) -> bytes:
    height, width, channels = image.shape
    return sealed(IMAGE_HEADER, IMAGE_MAGIC, height, width, channels, sample_id, digest(pixels))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().contiguous().view(torch.uint8).numpy().reshape(-1).data
