"""Where the bytes of a `.bin` come from: a mapped file, reads of a file, or range requests to an object store.

A source gives views (`view`) and copies into memory of the caller (`copy`). What it gives of a mapped file is a view of
the mapping, which it keeps alive; the others read. `gathered` reads several spans at once, near ones as one.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

import numpy as np

from megacogvx.data.indexed.remote import Folder, RemotePath
from megacogvx.errors import DataError

Access = Literal["mmap", "pread"]
Span = tuple[int, int]  # first byte, number of bytes
LOCAL_GAP, REMOTE_GAP = 1 << 14, 1 << 18  # bytes between two spans that are rather read than asked for apart
REMOTE_REQUESTS = 4  # spans of one sample that are asked for at a time


class Source(Protocol):
    """The bytes of one `.bin`."""

    def view(self, start: int, length: int) -> np.ndarray:
        """Return bytes as uint8 `[length]`; raises `DataError` where the file ends before or can't be read."""
        ...

    def copy(self, start: int, out: np.ndarray) -> None:
        """Fill `out`, uint8 `[n]`, with the bytes from `start` on; raises as `view`."""
        ...

    def gathered(self, spans: Sequence[Span]) -> Source:
        """Return a source that holds these spans, and perhaps others; raises as `view`."""
        ...

    def check_size(self) -> None:
        """Raise `DataError` if reading a view could kill the process, since the file has become shorter."""
        ...


class MappedSource:
    """A mapped file; writing into a view changes a private copy of the page, never the file.

    Attributes:
        data: the whole file, uint8.
    """

    def __init__(self, path: Path, size: int) -> None:
        """Map the first `size` bytes."""
        self.path, self.size = path, size
        with path.open("rb") as file:
            self._mapping = mmap.mmap(
                file.fileno(), size, mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0),
                mmap.PROT_READ | mmap.PROT_WRITE,
            )  # fmt: skip
        self.data = np.frombuffer(self._mapping, np.uint8)

    def view(self, start: int, length: int) -> np.ndarray:
        """Return a view of the mapping."""
        return self.data[start : start + length]

    def copy(self, start: int, out: np.ndarray) -> None:
        """Copy out of the mapping."""
        out[:] = self.data[start : start + len(out)]

    def gathered(self, spans: Sequence[Span]) -> MappedSource:
        """Return itself."""
        return self

    def check_size(self) -> None:
        """Reading a mapped page beyond the end of a file that was cut is SIGBUS, so look first."""
        size = self._mapping.size()  # of the file that was mapped, whatever bears its name now
        if size < self.size:
            raise DataError(f"{self.path} has shrunk from {self.size} to {size} bytes while in use")


class FileSource:
    """Reads of a file, for network file systems: a cut file or a stuck server is an error of one read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None

    def view(self, start: int, length: int) -> np.ndarray:
        """Read into memory of its own."""
        out = np.empty(length, np.uint8)
        self.copy(start, out)
        return out

    def copy(self, start: int, out: np.ndarray) -> None:
        """Read into `out`."""
        view, done = out.data, 0
        try:
            if self._file is None:
                self._file = self.path.open("rb", buffering=0)
            while done < len(out):
                count = os.preadv(self._file.fileno(), [view[done:]], start + done)
                if not count:
                    raise DataError(
                        f"{self.path} ends at byte {start + done}, {start + len(out)} are needed: truncated"
                    )
                done += count
        except OSError as error:
            raise DataError(f"{self.path} can't be read at byte {start}: {error.strerror}") from None

    def gathered(self, spans: Sequence[Span]) -> Source:
        """Read the spans, near ones at once."""
        return Pieces([(start, self.view(start, length)) for start, length in merged(spans, LOCAL_GAP)])

    def check_size(self) -> None:
        """Reads find the end of the file by themselves."""


class RemoteSource:
    """Range requests to an object store."""

    def __init__(self, path: RemotePath) -> None:
        self.path = path

    def view(self, start: int, length: int) -> np.ndarray:
        """Fetch a range."""
        return np.frombuffer(bytearray(self.path.read_range(start, start + length)), np.uint8)  # writable

    def copy(self, start: int, out: np.ndarray) -> None:
        """Fetch a range into `out`."""
        out[:] = np.frombuffer(self.path.read_range(start, start + len(out)), np.uint8)

    def gathered(self, spans: Sequence[Span]) -> Source:
        """Fetch the spans side by side, near ones as one range."""
        ranges = merged(spans, REMOTE_GAP)
        if len(ranges) == 1:
            return Pieces([(ranges[0][0], self.view(*ranges[0]))])
        with ThreadPoolExecutor(REMOTE_REQUESTS) as pool:
            parts = list(pool.map(lambda span: self.view(*span), ranges))
        return Pieces([(start, part) for (start, _), part in zip(ranges, parts, strict=True)])

    def check_size(self) -> None:
        """A range that the store can't give is an error of its read."""


class Pieces:
    """Spans of a file that are in memory."""

    def __init__(self, parts: Sequence[tuple[int, np.ndarray]]) -> None:
        """Keep (first byte, bytes) of each."""
        self._parts = parts

    def view(self, start: int, length: int) -> np.ndarray:
        """Return a view of the part that holds these bytes."""
        for first, part in self._parts:
            if first <= start and start + length <= first + len(part):
                return part[start - first : start - first + length]
        assert not length, (start, length, [(first, len(part)) for first, part in self._parts])
        return np.empty(0, np.uint8)

    def copy(self, start: int, out: np.ndarray) -> None:
        """Copy out of the part that holds these bytes."""
        out[:] = self.view(start, len(out))

    def gathered(self, spans: Sequence[Span]) -> Pieces:
        """Return itself."""
        return self

    def check_size(self) -> None:
        """What is in memory stays."""


def merged(spans: Sequence[Span], gap: int) -> list[Span]:
    """Return `spans` in order, those with at most `gap` bytes between them as one; empty ones are left out."""
    result: list[Span] = []
    for start, length in sorted(span for span in spans if span[1]):
        if result and start <= sum(result[-1]) + gap:
            first, before = result.pop()
            result.append((first, max(first + before, start + length) - first))
        else:
            result.append((start, length))
    return result


def open_source(path: Folder, size: int, access: Access) -> Source:
    """Return the source of the `.bin` at `path`, of `size` bytes; URLs are read by ranges whatever `access` says.

    Raises:
        DataError: the file is gone, shorter, or there is no room for a mapping.
    """
    if isinstance(path, RemotePath):
        return RemoteSource(path)
    try:
        return MappedSource(path, size) if access == "mmap" else FileSource(path)
    except (OSError, ValueError) as error:  # ValueError: the file is shorter than `size`
        raise DataError(f"{path} can't be mapped: {error}") from None
