"""ClipList: the clips of an encoding, of which a process holds the keys of all and the rows of those that it encodes.

Fifty million clips as objects are 75 GB; their keys are 0.4 GB, and what decides which clip is in which shard. So the
list is parts of a few thousand clips, each of which is read when one of its clips is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import overload

import numpy as np
import xxhash

from megacogvx.data.clips import Clip, list_path, parse_clip
from megacogvx.data.indexed.layout import MAX_ID
from megacogvx.errors import DataError
from megacogvx.log import get_logger

PART = 4096  # rows of a list that are one part
HELD_PARTS = 4  # parts whose clips a process holds; a shard of a thousand clips touches one or two

logger = get_logger(__name__)


def sample_id(clip: Clip) -> int:
    """Return the 64-bit key of a record, from the clip's file name and caption; it stays when the dataset is merged."""
    return xxhash.xxh3_64_intdigest(f"{clip.path.name}\0{clip.caption}".encode()) % MAX_ID


@dataclass(frozen=True)
class Part:
    """Some consecutive clips: their keys, uint64 `[n]`, and what reads them."""

    sample_ids: np.ndarray
    read: Callable[[], Sequence[Clip]]


class ClipList(Sequence[Clip]):
    """Clips in order, each once: rows that name the same clip with the same caption again are left out.

    Attributes:
        sample_ids: of the clips, uint64 `[n]`.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        """Join `parts`; none of them is read."""
        ids = np.concatenate([np.empty(0, np.uint64), *(part.sample_ids for part in parts)])
        self._kept = np.sort(np.unique(ids, return_index=True)[1])  # places of the first of each
        self._starts = np.cumsum([0, *(len(part.sample_ids) for part in parts)])
        self.sample_ids: np.ndarray = ids[self._kept]
        self._read = lru_cache(HELD_PARTS)(lambda part: parts[part].read())
        if len(self) < len(ids):
            logger.warning("left out: %d x clip that is listed twice", len(ids) - len(self))

    @classmethod
    def of(cls, clips: Sequence[Clip]) -> ClipList:
        """Return a list of clips that are in memory."""
        return cls([Part(_ids(clips), lambda: clips)])

    @classmethod
    def from_file(cls, path: Path) -> ClipList:
        """Return the clips of a clips.jsonl, or of the one in folder `path`; every row is checked once.

        Raises:
            DataError: as `read_clips`.
        """
        path, parts, number, offset = list_path(path), list[Part](), 0, 0
        with path.open("rb") as file:
            while lines := list(islice(file, PART)):
                ids = _ids([parse_clip(line, path, number + place) for place, line in enumerate(lines, start=1)])
                parts.append(Part(ids, _Lines(path, number, offset, len(lines))))
                number, offset = number + len(lines), offset + sum(map(len, lines))
        if not parts:
            raise DataError(f"{path} lists no clip")
        return cls(parts)

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, place: int) -> Clip: ...
    @overload
    def __getitem__(self, place: slice) -> list[Clip]: ...
    def __getitem__(self, place: int | slice) -> Clip | list[Clip]:
        if isinstance(place, slice):
            return [self._at(int(row)) for row in self._kept[place]]
        return self._at(int(self._kept[place]))

    def __iter__(self) -> Iterator[Clip]:
        return (self._at(int(row)) for row in self._kept)

    def checksum(self) -> str:
        """Return xxh3-128 of the keys in order, as decimal lines."""
        lines = xxhash.xxh3_128()
        for start in range(0, len(self), PART):
            text = "\n".join(map(str, self.sample_ids[start : start + PART].tolist()))
            lines.update((("\n" if start else "") + text).encode())
        return lines.hexdigest()

    def _at(self, row: int) -> Clip:
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._read(part)[row - int(self._starts[part])]


@dataclass(frozen=True)
class _Lines:
    """Reads `count` lines of a clips.jsonl from byte `offset` on, before which there are `before` lines."""

    path: Path
    before: int
    offset: int
    count: int

    def __call__(self) -> list[Clip]:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            lines = list(islice(file, self.count))
        if len(lines) < self.count:
            raise DataError(f"{self.path} has become shorter while it was in use")
        return [parse_clip(line, self.path, self.before + place) for place, line in enumerate(lines, start=1)]


def _ids(clips: Sequence[Clip]) -> np.ndarray:
    return np.fromiter(map(sample_id, clips), np.uint64, len(clips))
