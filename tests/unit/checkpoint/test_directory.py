from __future__ import annotations

import contextlib
import logging
import os

import pytest

from megacogvx.checkpoint.directory import TRACKER, CheckpointDirectory
from megacogvx.checkpoint.manifest import MANIFEST, files_of, read_manifest, seal, verify
from megacogvx.errors import CheckpointError


def write(directory, step, content=b"weights"):
    """Write a checkpoint of two files, one in a folder of its own."""
    partial = directory.begin(step)
    (partial / "tensors.bin").write_bytes(content)
    (partial / "inner").mkdir()
    (partial / "inner" / "more.bin").write_bytes(b"more")
    return directory.commit(step, {name: seal(partial, name) for name in files_of(partial)})


def names(directory):
    return sorted(file.name for file in directory.folder.iterdir() if file.name != TRACKER)


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
    assert names(directory) == ["step-00000100"]
    assert (directory.folder / TRACKER).read_text() == "100\n"


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
    assert names(directory)[0] == "step-00000001" and ".partial" in "".join(names(directory)[1:])
    directory.recover()
    assert names(directory) == ["step-00000001"]


def test_commit_refuses_files_that_were_not_sealed(directory):
    partial = directory.begin(1)
    (partial / "tensors.bin").write_bytes(b"weights")
    with pytest.raises(CheckpointError, match="does not hold"):
        directory.commit(1, {})
    assert directory.steps() == []


def test_retention_keeps_the_newest_and_every_so_many(directory):
    for step in range(100, 1000, 100):
        write(directory, step)
    assert directory.prune(900, None, 300) == []
    assert directory.prune(900, 2, 300) == [100, 200, 400, 500, 700]
    assert directory.steps() == [300, 600, 800, 900]
    assert directory.prune(900, 1, None) == [300, 600, 800]
    assert names(directory) == ["step-00000900"]


def test_a_run_that_went_back_behind_damaged_checkpoints_keeps_what_it_writes(directory):
    for step in (100, 200, 300):  # 200 and 300 turn out damaged, the run goes on from 100
        write(directory, step)
    write(directory, 150)
    assert directory.prune(150, 1, None) == [100]
    assert directory.steps() == [150, 200, 300]


class Killed(BaseException):
    """Stands for the end of the process."""


def test_wherever_a_commit_or_a_prune_is_killed_the_last_complete_checkpoint_stays(directory, monkeypatch):
    """Kill before each rename, deletion and sync of the third save; then start again."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # of no use to a test, and slow
    for name in ("replace", "fsync"):
        real, survived, before = getattr(os, name), False, -1
        while not survived:
            before += 1
            for step in (1, 2, 2):
                write(directory, step)
            calls = iter(range(100))

            def fatal(*arguments, real=real, calls=calls, before=before):
                if next(calls) == before:
                    raise Killed
                return real(*arguments)

            monkeypatch.setattr(os, name, fatal)
            with contextlib.suppress(Killed):
                write(directory, 2, b"new weights")
                write(directory, 3)
                directory.prune(3, 1, None)
                survived = True
            monkeypatch.setattr(os, name, real)
            again = CheckpointDirectory(directory.folder)
            again.recover()
            assert verify(again.latest()) in ((3,) if survived else (2, 3)), f"{name} {before}"
            assert names(again) == [again.path(step).name for step in again.steps()], "leftovers"
            assert int((again.folder / TRACKER).read_text()) in (2, 3)
        assert before > 6, "too few places to be killed at"
