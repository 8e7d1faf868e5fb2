"""Copy latents and text of records into memory of the caller: what a pack in pinned memory is assembled by.

A training reads hundreds of thousands of samples an hour, of 0.05 MB and more, so what is not the copy itself counts:
no tensor is made, the index's columns are read as memory views (a Python integer in one step, without a list of them),
and a whole record whose text is its own is one copy. With checksums on each frame is hashed where it was copied to,
while it is in the cache: what was checked is what the caller has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import xxhash

from megacogvx.data.indexed.layout import RECORD_HEADER, ShardIndex, aligned
from megacogvx.data.indexed.source import MappedSource, Source

HEADER = RECORD_HEADER.size
_hash: Callable[[Any], int] = xxhash.xxh3_64_intdigest  # takes arrays, whatever its stub says


class RecordCopier:
    """Copies records of one shard."""

    def __init__(self, index: ShardIndex, source: Source, damaged: Callable[[int, str], Exception]) -> None:
        """Prepare.

        Args:
            index: of the shard, its rows checked.
            source: of its `.bin`.
            damaged: (row, what) -> the error to raise where a checksum differs.
        """
        self._index, self._source, self._damaged = index, source, damaged
        self._data = source.data if isinstance(source, MappedSource) else None
        self._bytes = None if self._data is None else self._data.data
        self._cell_bytes, self._token_bytes = index.encoder.frame_cell_bytes, index.encoder.text_token_bytes
        names = (
            "record", "frames", "height", "width", "text_offset", "text_length", "text_hash", "metadata_offset",
            "metadata_length", "metadata_hash", "latent_hash",
        )  # fmt: skip
        (
            self._record, self._frames, self._height, self._width, self._text, self._tokens, self._text_hash,
            self._note, self._note_bytes, self._note_hash, self._latent_hash,
        ) = (index.columns[name].data for name in names)  # fmt: skip

    def whole(self, row: int, out: np.ndarray) -> int:
        """Copy a whole record unchecked: latents from 0 on, text from the next multiple of 64.

        Args:
            row: of the record.
            out: uint8 `[n]`, large enough.

        Returns:
            Bytes of `out` that are taken, a multiple of 64.
        """
        start = self._record[row] + HEADER
        text, end = self._text[row], self._note[row]
        if text < start:  # an equal caption's, which lies in an earlier record
            return self._apart(row, start, end, text, out)
        if self._data is None:
            self._source.copy(start, out[: end - start])
        else:
            out[: end - start] = self._data[start:end]
        return end - start

    def frames(self, row: int, frames: range | None, out: np.ndarray, check: bool) -> int:
        """Copy latent frames `frames` (None: all) from 0 on, the text from the next multiple of 64.

        Args:
            row: of the record.
            frames: consecutive.
            out: uint8 `[n]`, large enough.
            check: compare the checksums of what is copied, and of the metadata.

        Returns:
            Bytes of `out` that are taken, a multiple of 64.

        Raises:
            DataError: bytes differ from their checksum, or can't be read.
        """
        frames = range(self._frames[row]) if frames is None else frames
        frame_bytes = self._height[row] * self._width[row] * self._cell_bytes
        start = self._record[row] + HEADER + frames.start * frame_bytes
        latent_bytes, text_bytes = len(frames) * frame_bytes, self._tokens[row] * self._token_bytes
        note, note_bytes, text = self._note[row], self._note_bytes[row] if check else 0, self._text[row]
        hashes, hash_bytes = aligned(note + note_bytes), 8 * self._frames[row]
        behind = hashes + hash_bytes - note if check else 0
        source = self._source
        if self._bytes is None:
            source = source.gathered(((start, latent_bytes), (text, text_bytes), (note, behind)))
        text_place = aligned(latent_bytes)
        end = text_place + text_bytes
        if not check:
            source.copy(start, out[:latent_bytes])
            source.copy(text, out[text_place:end])
            return aligned(end)
        source.check_size()
        trailer = source.view(note, behind).data if self._bytes is None else self._bytes[note : note + behind]
        stored = trailer[hashes - note :]
        if _hash(stored) != self._latent_hash[row]:
            raise self._damaged(row, "the list of the latents' checksums")
        for place, (frame, expected) in enumerate(zip(frames, stored.cast("Q")[frames.start :], strict=False)):
            piece = out[place * frame_bytes : (place + 1) * frame_bytes]
            source.copy(start + place * frame_bytes, piece)
            if _hash(piece) != expected:
                raise self._damaged(row, f"latent frame {frame}")
        piece = out[text_place:end]
        source.copy(text, piece)
        if _hash(piece) != self._text_hash[row]:
            raise self._damaged(row, "the text")
        if _hash(trailer[:note_bytes]) != self._note_hash[row]:
            raise self._damaged(row, "the metadata")
        return aligned(end)

    def _apart(self, row: int, start: int, end: int, text: int, out: np.ndarray) -> int:
        length = self._tokens[row] * self._token_bytes
        source = self._source.gathered(((start, end - start), (text, length)))
        source.copy(start, out[: end - start])
        source.copy(text, out[end - start : end - start + length])
        return aligned(end - start + length)
