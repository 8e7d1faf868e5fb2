"""Dataset folders in an object store or behind a web server: `s3://bucket/dataset`, `gs://...`, `http://...`, `memory://...`.

`RemotePath` has the few methods of `pathlib.Path` that the readers of manifests, indexes and side columns use, so there
is one reader for both; `.bin` files are read by ranges. The protocols, and their credentials, are fsspec's
(https://filesystem-spec.readthedocs.io/en/latest/features.html#configuration): `FSSPEC_S3_ENDPOINT_URL` and the like,
or a file in `~/.config/fsspec/`. What fails is tried again, `ATTEMPTS` times in all, then it is a `DataError`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from megacogvx.errors import DataError
from megacogvx.log import get_logger

T = TypeVar("T")
ATTEMPTS = 4
FIRST_WAIT = 0.2  # seconds before the second attempt; four times longer before each further one
FINAL = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)  # asking again changes nothing
logger = get_logger(__name__)


@dataclass(frozen=True)
class RemoteStat:
    """What is known of a remote file; `st_size` in bytes, as of `os.stat`."""

    st_size: int


@dataclass(frozen=True)
class RemotePath:
    """A file or folder at a URL.

    Attributes:
        url: with its protocol, without a slash at its end.
    """

    url: str

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The part behind the last slash."""
        return self.url.rsplit("/", 1)[1]

    @property
    def stem(self) -> str:
        """The name without its last suffix."""
        return self.name.rpartition(".")[0] or self.name

    def resolve(self) -> RemotePath:
        """Return the path: a URL has one form."""
        return self

    def is_file(self) -> bool:
        """Whether there is a file.

        Raises:
            DataError: the store doesn't answer.
        """
        return bool(self._ask("isfile", lambda files, path: files.isfile(path)))

    def stat(self) -> RemoteStat:
        """Return the file's size.

        Raises:
            DataError: there is no such file, or the store doesn't answer.
        """
        size = self._ask("size", lambda files, path: files.info(path)["size"])
        if size is None:
            raise DataError(f"{self} has no size that its server tells; serve it with Content-Length")
        return RemoteStat(int(size))

    def read_bytes(self) -> bytes:
        """Return the whole file.

        Raises:
            DataError: there is no such file, or the store doesn't answer.
        """
        return bytes(self._ask("read", lambda files, path: files.cat_file(path)))

    def read_range(self, start: int, stop: int) -> bytes:
        """Return bytes `start` to `stop` of the file.

        Raises:
            DataError: it has fewer, or the store doesn't answer.
        """

        def read(files: Any, path: str) -> bytes:
            data = bytes(files.cat_file(path, start=start, end=stop))
            if len(data) > stop - start:
                raise DataError(f"{self}: {len(data)} bytes came for a range of {stop - start}: no ranges are served")
            return data

        data = self._ask(f"read bytes {start} to {stop}", read)
        if len(data) < stop - start:
            raise DataError(f"{self} ends at byte {start + len(data)}, {stop} are needed: truncated")
        return data

    def glob(self, pattern: str) -> list[RemotePath]:
        """Return the files of this folder whose name matches `pattern`; none where the store can't list.

        Raises:
            DataError: the store doesn't answer.
        """
        found = self._ask("list", lambda files, path: files.ls(path, detail=False) if files.isdir(path) else [])
        names = sorted({str(each).rstrip("/").rsplit("/", 1)[-1] for each in found})
        return [self / name for name in names if fnmatch(name, pattern)]

    def _ask(self, what: str, question: Callable[[Any, str], T]) -> T:
        """Return `question(file system, path)`, asked again when it fails for a reason that may pass."""
        files, path = self._file_system()
        wait = FIRST_WAIT
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return question(files, path)
            except DataError:
                raise
            except FINAL as error:
                raise DataError(f"{self}: {what} failed: {type(error).__name__}: {error}") from error
            except Exception as error:  # each protocol has errors of its own
                if attempt == ATTEMPTS:
                    raise DataError(
                        f"{self}: {what} failed {ATTEMPTS} times, the last time with {type(error).__name__}: {error}"
                    ) from error
                logger.warning("%s: %s failed (%r); tried again in %g s", self, what, error, wait)
                time.sleep(wait)
                wait *= 4
        raise AssertionError("unreachable")

    def _file_system(self) -> tuple[Any, str]:
        protocol = self.url.split("://", 1)[0]
        try:
            return fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise DataError(
                f"{self}: the protocol {protocol}:// can't be used: {error} (pip install 'megacogvx[stores]' for s3 "
                "and http)"
            ) from None


Folder = Path | RemotePath


def folder_at(place: str | Path | RemotePath) -> Folder:
    """Return the folder at a path, or at a URL with `://`."""
    if isinstance(place, RemotePath):
        return place
    if "://" in str(place):
        return RemotePath(str(place).rstrip("/"))
    return Path(place)
