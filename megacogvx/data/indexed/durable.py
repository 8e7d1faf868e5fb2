"""Files that appear whole or not at all, and locks that end with the process that holds them."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megacogvx.errors import DataError


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what a disk that is full, read-only or broken raises into a `DataError` that names `folder`."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write to {folder}: {error.strerror}; make room, or name another folder, and start again: what is "
            "finished is kept"
        ) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside, sync, rename, sync the folder: readers see the old file or the whole new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def try_lock(file: BinaryIO) -> bool:
    """Lock the file until it is closed; False if another process holds it, True where a file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
