"""Rows of the fault matrix that are about files and the machine: checkpoints, full disks, failing calls, clocks."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from matrix_cases import Case, Outcome, Session, check, compare, flip, pick, recovery
from matrix_datasets import full_dataset

from megacogvx.checkpoint.directory import CheckpointDirectory
from megacogvx.checkpoint.manifest import MANIFEST, verify
from megacogvx.errors import CheckpointError
from megacogvx.testing.fault_points import Fault
from megacogvx.testing.faults import Ended, Training

FLIPS, TRUNCATIONS = 1000, 200
IMPORTED = "step-00000004"


def row_3() -> Iterator[Case]:
    """Every change to a checkpoint's files is named before anything is read; then training goes back."""

    def fuzz(session: Session, folder: Path) -> Outcome:
        run = session.reference("dp2").run
        path = folder / IMPORTED
        shutil.copytree(run / "checkpoints" / IMPORTED, path)
        files = sorted(file for file in path.rglob("*") if file.is_file())
        outcome = Outcome(injected=FLIPS + TRUNCATIONS)
        for number in range(FLIPS + TRUNCATIONS):
            file = files[pick(len(files), "file", number)]
            if number < FLIPS:
                undo = flip(file, number)
            else:
                content = file.read_bytes()
                file.write_bytes(content[: pick(len(content), "cut", number)])
                undo = lambda file=file, content=content: file.write_bytes(content)  # noqa: E731
            outcome.recovered += _named(path, file.name)
            undo()
        verify(path)
        outcome.silent = outcome.injected - outcome.recovered
        return outcome

    yield Case(3, f"{FLIPS} flips, {TRUNCATIONS} truncations", fuzz)
    for name, change in CHECKPOINT_CHANGES.items():
        yield Case(3, f"{name}, then training", _goes_back(change))


def _named(path: Path, name: str) -> bool:
    try:
        verify(path)
    except CheckpointError as error:
        return name in str(error)
    return False


def _swap(path: Path) -> None:
    first, second = (path / f"__{rank}_0.distcp" for rank in range(2))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def _take_from_another_step(path: Path) -> None:
    shutil.copy(path.parent / "step-00000002" / "__1_0.distcp", path / "__1_0.distcp")


CHECKPOINT_CHANGES: dict[str, Callable[[Path], Any]] = {
    "a flipped bit in a shard": lambda path: flip(path / "__1_0.distcp", "training"),
    "a flipped bit in .metadata": lambda path: flip(path / ".metadata", "training"),
    "a shard cut off": lambda path: os.truncate(path / "__0_0.distcp", 1000),
    "a shard missing": lambda path: (path / "__0_0.distcp").unlink(),
    "a foreign file": lambda path: (path / "__2_0.distcp").write_bytes(b"x"),
    "two shards swapped": _swap,
    "a shard of another step": _take_from_another_step,
    "no manifest": lambda path: (path / MANIFEST).unlink(),
}


def _goes_back(change: Callable[[Path], Any]) -> Callable[[Session, Path], Outcome]:
    def run(session: Session, folder: Path) -> Outcome:
        training = session.training(folder, "dp2")
        reference = session.reference("dp2")
        shutil.copytree(reference.run, training.run)
        _forget_after(training, 4)
        change(training.run / "checkpoints" / IMPORTED)
        ended = check(training.start())
        assert "step-00000002" in ended.output[0], ended.output[0]
        return compare(session, training, "dp2", Outcome())

    return run


def _forget_after(training: Training, step: int) -> None:
    """Make a copied run look as if it had ended after `step`."""
    for path in (training.run / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    file = training.run / "metrics.jsonl"
    file.write_text("".join(line + "\n" for line in file.read_text().splitlines() if json.loads(line)["step"] < step))
    for consumed in training.run.glob("consumed-*.jsonl"):
        lines = [line for line in consumed.read_text().splitlines() if json.loads(line)[0] < step]
        consumed.write_text("".join(line + "\n" for line in lines))


def row_6() -> Iterator[Case]:
    """A disk that takes no more: the last checkpoint stays, and the run goes on or ends, by policy."""
    full = Fault("limit_files", None, {"size": 20_000, "step": 3})
    goes_on = recovery("dp2", full, holds=_failed_save_went_on)
    yield Case(6, "a save fails, the run goes on", goes_on)
    stops = {"checkpoint": {"failed_saves": 0}}
    yield Case(6, "a save fails, the run stops", recovery("dp2", full, holds=_failed_save, changes=stops))
    yield Case(6, "the log can't be written", lambda session, folder: _full_log(session, folder))
    yield Case(6, "the dataset can't be written", lambda session, folder: full_dataset(folder))


def _failed_save_went_on(ended: Ended, training: Training) -> bool:
    return ended.well and "the training goes on" in ended.output[0] and training.steps() == [2, 6]


def _failed_save(ended: Ended, training: Training) -> bool:
    return set(ended.statuses) == {2} and "step-00000004" in ended.output[0] and training.steps() == [2]


def _full_log(session: Session, folder: Path) -> Outcome:
    training = session.training(folder, "dp2")
    ended = training.start(Fault("fill_log", 0, {"step": 2}))
    assert ended.statuses == [2, 2], (ended.statuses, ended.output)  # the other rank doesn't wait for the first
    assert all("metrics.jsonl" in output for output in ended.output), ended.output
    check(training.start())
    return compare(session, training, "dp2", Outcome())


def row_13() -> Iterator[Case]:
    """The loader's thread fails on one rank: an error that names the sample, nobody waits, no shared memory is left."""

    def run(session: Session, folder: Path) -> Outcome:
        training = session.training(folder, "dp2")
        before = set(os.listdir("/dev/shm"))
        ended = training.start(Fault("fail_reading", 1, {"step": 3}))
        assert ended.statuses == [2, 2], (ended.statuses, ended.output)
        assert all("rank 1: DataError: sample 10" in output for output in ended.output), ended.output
        assert training.steps() == [2], "the save that was on its way is complete"
        assert set(os.listdir("/dev/shm")) <= before
        check(training.start())
        return compare(session, training, "dp2", Outcome())

    yield Case(13, "reading fails on rank 1", run)


def row_14() -> Iterator[Case]:
    """A clock that jumps, calls that fail once, and a place that can't be written."""
    for seconds in (3600.0, -3600.0):
        fault = Fault("jump_clock", None, {"seconds": seconds, "step": 3})
        watched = {"guard": {"stuck_seconds": 60.0}}
        case = recovery("dp2", fault, holds=lambda ended, _: ended.well, changes=watched)
        yield Case(14, f"the clock jumps by {seconds:.0f} s", case)
    for name, number in (("fsync", 0), ("fsync", 1), ("fsync", 4), ("replace", 0), ("replace", 1), ("mkdir", 0)):
        fault = Fault("fail_call", 0, {"name": name, "number": number, "step": 3, "error": errno.EIO})
        yield Case(14, f"EIO from {name} {number}", recovery("dp2", fault, holds=_failed_save_went_on))
    yield Case(14, "a file where the checkpoints go", lambda session, folder: _no_folder(session, folder))
    yield Case(14, "checkpoints deleted", lambda session, folder: _deleted(session, folder))


def _no_folder(session: Session, folder: Path) -> Outcome:
    training = session.training(folder, "dp2")
    training.run.mkdir()
    (training.run / "checkpoints").write_text("")
    ended = training.start(changes={"checkpoint": {"failed_saves": 0}})
    assert set(ended.statuses) == {2} and "checkpoints" in ended.output[0], (ended.statuses, ended.output)
    (training.run / "checkpoints").unlink()
    check(training.start())
    return compare(session, training, "dp2", Outcome())


def _deleted(session: Session, folder: Path) -> Outcome:
    training = session.training(folder, "dp2")
    check(training.start(changes={"training": {"steps": 4}}))
    shutil.rmtree(training.run / "checkpoints")
    assert CheckpointDirectory(training.run / "checkpoints").latest() is None
    check(training.start())
    return compare(session, training, "dp2", Outcome())


ROWS = (row_3, row_6, row_13, row_14)
