"""Files that appear whole, and locks."""

from __future__ import annotations

from pathlib import Path

import pytest

from megacogvx.data.indexed import DatasetWriter
from megacogvx.data.indexed.durable import try_lock, write_atomically
from megacogvx.errors import DataError
from megacogvx.testing.tiny_dataset import tiny_encoder


def test_a_file_is_the_old_one_or_the_whole_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fails(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megacogvx.data.indexed.durable.os.fsync", fails)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


def test_a_lock_is_held_until_its_file_is_closed(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("ab") as first, (tmp_path / "lock").open("ab") as second:
        assert try_lock(first) and not try_lock(second)
        first.close()
        assert try_lock(second)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write to .*file/dataset: Not a directory; make room"):
        DatasetWriter(tmp_path / "file" / "dataset", tiny_encoder())
