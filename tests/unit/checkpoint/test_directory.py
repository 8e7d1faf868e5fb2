from __future__ import annotations

import json
import logging

import pytest

from megacogvx.checkpoint.directory import MANIFEST, CheckpointDirectory, files_of, read_manifest, seal, verify
from megacogvx.errors import CheckpointError


def write(directory, step, content=b"weights"):
    """Write a checkpoint of two files, one in a folder of its own."""
    partial = directory.begin(step)
    (partial / "tensors.bin").write_bytes(content)
    (partial / "inner").mkdir()
    (partial / "inner" / "more.bin").write_bytes(b"more")
    return directory.commit(step, {name: seal(partial, name) for name in files_of(partial)})


@pytest.fixture
def directory(tmp_path):
    return CheckpointDirectory(tmp_path / "checkpoints")


@pytest.fixture
def lines(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("megacogvx"), "propagate", True)
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


def test_an_empty_run_has_no_checkpoint(directory):
    assert directory.steps() == []
    assert directory.latest() is None


def test_commit_gives_the_name_and_the_manifest(directory):
    path = write(directory, 100)
    assert path.name == "step-00000100"
    step, entries = read_manifest(path)
    assert step == 100
    assert sorted(entries) == ["inner/more.bin", "tensors.bin"]
    assert entries["tensors.bin"].size == 7
    assert verify(path) == 100
    assert sorted(file.name for file in directory.folder.iterdir()) == ["step-00000100"]


def test_latest_is_by_number_not_by_date(directory):
    for step in (2000, 300, 123456789):
        write(directory, step)
    assert directory.steps() == [300, 2000, 123456789]
    assert directory.latest() == directory.path(123456789)


def test_unfinished_ones_are_skipped_and_named(directory, lines):
    write(directory, 1)
    directory.begin(2)
    (write(directory, 3) / MANIFEST).unlink()
    (write(directory, 4) / "tensors.bin").unlink()
    (write(directory, 5) / "tensors.bin").write_bytes(b"short")
    (write(directory, 6) / MANIFEST).write_text("{")
    assert directory.steps() == [1]
    assert directory.latest() == directory.path(1)
    for step in (2, 3, 4, 5, 6):
        assert f"step-0000000{step}" in lines()


def test_writing_a_step_again_replaces_it(directory):
    write(directory, 1)
    directory.begin(1)
    path = write(directory, 1, b"other weights")
    assert (path / "tensors.bin").read_bytes() == b"other weights"
    assert sorted(file.name for file in directory.folder.iterdir()) == ["step-00000001"]


def test_commit_refuses_files_that_were_not_sealed(directory):
    partial = directory.begin(1)
    (partial / "tensors.bin").write_bytes(b"weights")
    with pytest.raises(CheckpointError, match="does not hold"):
        directory.commit(1, {})
    assert directory.steps() == []


@pytest.mark.parametrize("name", ["tensors.bin", "inner/more.bin"])
def test_a_flipped_bit_is_named(directory, name):
    path = write(directory, 1)
    content = bytearray((path / name).read_bytes())
    content[2] ^= 1
    (path / name).write_bytes(content)
    assert directory.steps() == [1], "only the checksum can tell"
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        verify(path)


def test_missing_short_and_foreign_files_are_named(directory):
    path = write(directory, 1)
    (path / "extra.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"extra\.bin is not in"):
        verify(path)
    (path / "extra.bin").unlink()
    (path / "tensors.bin").write_bytes(b"weight")
    with pytest.raises(CheckpointError, match="has 6 bytes instead of 7"):
        verify(path)
    (path / "tensors.bin").unlink()
    with pytest.raises(CheckpointError, match=r"tensors\.bin is missing"):
        verify(path)
    verify(path, ["inner/more.bin"])


def test_foreign_folders_say_what_is_near(directory):
    path = write(directory, 7)
    with pytest.raises(CheckpointError, match="step-00000007"):
        read_manifest(directory.path(8))
    with pytest.raises(CheckpointError, match=r"no manifest\.json; checkpoints in .*: step-00000007"):
        read_manifest(directory.folder)
    manifest = json.loads((path / MANIFEST).read_text())
    for change, match in (({"format": "x"}, "format 'x'"), ({"version": 99}, "version 99"), ({"files": [1]}, "read")):
        (path / MANIFEST).write_text(json.dumps({**manifest, **change}))
        with pytest.raises(CheckpointError, match=match):
            read_manifest(path)
