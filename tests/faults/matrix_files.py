"""Rows of the fault matrix that are about files: checkpoints, datasets, disks and clocks."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megacogvx import draws
from megacogvx.checkpoint.directory import CheckpointDirectory
from megacogvx.checkpoint.manifest import MANIFEST, verify
from megacogvx.data.indexed import DatasetWriter, IndexedDataset, finish_dataset
from megacogvx.data.indexed.verify import verify_dataset
from megacogvx.errors import CheckpointError, DataError
from megacogvx.testing.faults import Ended, Fault, Training
from megacogvx.testing.tiny_dataset import SIZES, tiny_encoder, tiny_item, write_tiny_dataset

matrix = sys.modules["matrix"]
Case, Outcome, Session = matrix.Case, matrix.Outcome, matrix.Session
FLIPS, TRUNCATIONS = 1000, 200
BIN_FLIPS, INDEX_FLIPS = 2000, 2000
WRITER_KILLS = 200
IMPORTED = "step-00000004"


def pick(below: int, *keys: int | str) -> int:
    """Draw a whole number."""
    what = " ".join(key for key in keys if isinstance(key, str))
    return int(draws.uniform(0, what, *(key for key in keys if isinstance(key, int))) * below)


def flip(file: Path, *keys: int | str) -> Callable[[], None]:
    """Turn one bit of a file; return what turns it back."""
    place, bit = pick(file.stat().st_size, "place", *keys), pick(8, "bit", *keys)

    def turn() -> None:
        with file.open("r+b") as handle:
            handle.seek(place)
            byte = handle.read(1)[0] ^ (1 << bit)
            handle.seek(place)
            handle.write(bytes([byte]))

    turn()
    return turn


def row_3() -> Iterator[Any]:
    """Every change to a checkpoint's files is named before anything is read; then training goes back."""

    def fuzz(session: Any, folder: Path) -> Any:
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


def _goes_back(change: Callable[[Path], Any]) -> Callable[[Any, Path], Any]:
    def run(session: Any, folder: Path) -> Any:
        training = session.training(folder, "dp2")
        reference = session.reference("dp2")
        shutil.copytree(reference.run, training.run)
        _forget_after(training, 4)
        change(training.run / "checkpoints" / IMPORTED)
        ended = matrix.check(training.start())
        assert "step-00000002" in ended.output[0], ended.output[0]
        return matrix.compare(session, training, "dp2", Outcome())

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


def row_4() -> Iterator[Any]:
    """Every change to a dataset's files is an error that names the shard, or changes nothing that is read."""
    yield Case(4, f"{BIN_FLIPS} flips of .bin", lambda session, folder: _fuzz_dataset(folder, ".bin", BIN_FLIPS))
    yield Case(4, f"{INDEX_FLIPS} flips of .idx", lambda session, folder: _fuzz_dataset(folder, ".idx", INDEX_FLIPS))
    yield Case(4, "truncated, swapped, missing", lambda session, folder: _break_dataset(folder))


def _content(folder: Path) -> list[Any]:
    dataset = IndexedDataset(folder)
    records = [dataset.sample(number) for number in range(len(dataset))]
    return [(r.sample_id, r.latents.view(-1).tolist(), r.text.view(-1).tolist(), r.metadata_json) for r in records]


def _fuzz_dataset(folder: Path, suffix: str, count: int) -> Any:
    dataset = folder / "dataset"
    write_tiny_dataset(dataset, 4, sizes=((1, 2, 2), (2, 2, 2)))
    expected, files = _content(dataset), sorted(dataset.glob(f"*{suffix}"))
    outcome = Outcome(injected=count)
    for number in range(count):
        file = files[number % len(files)]
        undo = flip(file, suffix, number)
        try:
            found = _content(dataset) == expected  # a bit of the padding
        except DataError as error:
            found = file.stem in str(error)
        undo()
        outcome.recovered += found
        outcome.silent += not found
    return outcome


def _break_dataset(folder: Path) -> Any:
    source = folder / "dataset"
    write_tiny_dataset(source)
    first, second = sorted(source.glob("*.bin"))
    changes: list[Callable[[Path], Any]] = [
        lambda at: os.truncate(at / first.name, first.stat().st_size // 2),
        lambda at: os.truncate(at / first.with_suffix(".idx").name, 100),
        lambda at: shutil.copy(at / second.name, at / first.name),
        lambda at: shutil.copy(at / second.with_suffix(".idx").name, at / first.with_suffix(".idx").name),
        lambda at: (at / first.name).unlink(),
        lambda at: (at / first.with_suffix(".idx").name).unlink(),
        lambda at: (at / "manifest.json").unlink(),
    ]
    outcome = Outcome(injected=len(changes) + 1)
    for change in changes:
        broken = folder / "broken"
        shutil.copytree(source, broken)
        change(broken)
        try:
            _content(broken)
        except DataError:
            outcome.recovered += 1
        shutil.rmtree(broken)
    shutil.copytree(source, folder / "shrunk")
    open_one = IndexedDataset(folder / "shrunk")
    open_one.sample(0)
    os.truncate(folder / "shrunk" / first.name, 64)  # while it is mapped: an unguarded read would be a bus error
    try:
        open_one.sample(1)
    except DataError:
        outcome.recovered += 1
    outcome.silent = outcome.injected - outcome.recovered
    return outcome


def row_5() -> Iterator[Any]:
    """A writer killed at a random moment; the next one goes on, and nothing is there twice or left over."""
    yield Case(5, f"{WRITER_KILLS} kills", lambda session, folder: _kill_writers(folder))


def _write(folder: Path, shard: int, shards: int) -> None:
    encoder = tiny_encoder()
    with DatasetWriter(folder, encoder, shard) as writer:
        for number in range(shard * 4, shard * 4 + 4) if not writer.finished else ():
            latents, text = tiny_item(number, SIZES[number % len(SIZES)], encoder)
            writer.add_item(latents=latents, text=text, sample_id=number, metadata={"number": number})
        if not writer.finished:
            writer.finalize()


def _kill_writers(folder: Path) -> Any:
    outcome, context, shards = Outcome(injected=WRITER_KILLS), multiprocessing.get_context("fork"), 2
    began = time.monotonic()
    writer = context.Process(target=_write, args=(folder / "measured", 0, shards))
    writer.start()
    writer.join()
    longest = time.monotonic() - began  # of an undisturbed one
    for number in range(WRITER_KILLS):
        dataset = folder / "dataset"
        for attempt in range(2):
            for shard in range(shards):
                writer = context.Process(target=_write, args=(dataset, shard, shards))
                writer.start()
                if attempt == 0 and shard == number % shards:
                    time.sleep(longest * draws.uniform(0, "kill writer", number))
                    os.kill(writer.pid or 0, signal.SIGKILL)
                writer.join()
        finish_dataset(dataset)
        report = verify_dataset(dataset)
        whole = sorted(int(i) for i in IndexedDataset(dataset).sample_id) == list(range(4 * shards))
        outcome.recovered += whole and not report.problems and not report.notes
        shutil.rmtree(dataset)
    return outcome


def row_6() -> Iterator[Any]:
    """A disk that takes no more: the last checkpoint stays, and the run goes on or ends, by policy."""
    full = Fault("limit_files", None, {"size": 20_000, "step": 3})
    goes_on = matrix.recovery("dp2", full, holds=_failed_save_went_on)
    yield Case(6, "a save fails, the run goes on", goes_on)
    stops = {"checkpoint": {"failed_saves": 0}}
    yield Case(6, "a save fails, the run stops", matrix.recovery("dp2", full, holds=_failed_save, changes=stops))
    yield Case(6, "the log can't be written", lambda session, folder: _full_log(session, folder))
    yield Case(6, "the dataset can't be written", lambda session, folder: _full_dataset(folder))


def _failed_save_went_on(ended: Ended, training: Training) -> bool:
    return ended.well and "the training goes on" in ended.output[0] and training.steps() == [2, 6]


def _failed_save(ended: Ended, training: Training) -> bool:
    return set(ended.statuses) == {2} and "step-00000004" in ended.output[0] and training.steps() == [2]


def _full_log(session: Any, folder: Path) -> Any:
    training = session.training(folder, "dp2")
    ended = training.start(Fault("fill_log", 0, {"step": 2}))
    assert ended.statuses == [2, 2], (ended.statuses, ended.output)  # the other rank doesn't wait for the first
    assert all("metrics.jsonl" in output for output in ended.output), ended.output
    matrix.check(training.start())
    return matrix.compare(session, training, "dp2", Outcome())


def _full_dataset(folder: Path) -> Any:
    def write() -> None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
        try:
            _write(folder / "dataset", 0, 1)
        except DataError as error:
            os._exit(0 if "shard" in str(error) else 3)
        os._exit(4)

    writer = multiprocessing.get_context("fork").Process(target=write)
    writer.start()
    writer.join()
    assert writer.exitcode == 0, writer.exitcode
    _write(folder / "dataset", 0, 1)
    finish_dataset(folder / "dataset")
    assert not verify_dataset(folder / "dataset").problems
    return Outcome(recovered=1)


def row_12() -> Iterator[Any]:
    """A dataset that changes under a run is refused by name; the old one is taken again."""

    def add_shard(folder: Path) -> None:
        encoder = tiny_encoder()
        with DatasetWriter(folder, encoder, 2) as writer:
            latents, text = tiny_item(5000, SIZES[0], encoder)
            writer.add_item(latents=latents, text=text, sample_id=5000, metadata={})
            writer.finalize()
        finish_dataset(folder)

    changes: dict[str, Callable[[Path], Any]] = {
        "a shard added": add_shard,
        "other samples": lambda folder: (shutil.rmtree(folder), write_tiny_dataset(folder, first_id=2000)),
        "fewer samples": lambda folder: (shutil.rmtree(folder), write_tiny_dataset(folder, 8)),
    }
    for name, change in changes.items():
        yield Case(12, name, _changed(change))


def _changed(change: Callable[[Path], Any]) -> Callable[[Any, Path], Any]:
    def run(session: Any, folder: Path) -> Any:
        training = session.training(folder, "dp2")
        original = training.dataset
        # Stopped, not ended: the last step of a run is one on which it validates.
        stopped = training.start(Fault("signal_self", 0, {"names": ["SIGTERM"], "step": 3}))
        assert stopped.statuses == [75, 75] and training.steps() == [2, 4], (stopped.statuses, stopped.output)
        training.dataset = folder / "changed"  # the held-out one stays
        shutil.copytree(original, training.dataset)
        change(training.dataset)
        ended = training.start()
        assert ended.statuses == [2, 2] and "corpus=" in ended.output[0], (ended.statuses, ended.output)
        training.dataset = original
        matrix.check(training.start())
        return matrix.compare(session, training, "dp2", Outcome())

    return run


def row_13() -> Iterator[Any]:
    """The loader's thread fails on one rank: an error that names the sample, nobody waits, no shared memory is left."""

    def run(session: Any, folder: Path) -> Any:
        training = session.training(folder, "dp2")
        before = set(os.listdir("/dev/shm"))
        ended = training.start(Fault("fail_reading", 1, {"step": 3}))
        assert ended.statuses == [2, 2], (ended.statuses, ended.output)
        assert all("rank 1: DataError: sample 10" in output for output in ended.output), ended.output
        assert training.steps() == [2], "the save that was on its way is complete"
        assert set(os.listdir("/dev/shm")) <= before
        matrix.check(training.start())
        return matrix.compare(session, training, "dp2", Outcome())

    yield Case(13, "reading fails on rank 1", run)


def row_14() -> Iterator[Any]:
    """A clock that jumps, calls that fail once, and a place that can't be written."""
    for seconds in (3600.0, -3600.0):
        fault = Fault("jump_clock", None, {"seconds": seconds, "step": 3})
        watched = {"guard": {"stuck_seconds": 60.0}}
        case = matrix.recovery("dp2", fault, holds=lambda ended, _: ended.well, changes=watched)
        yield Case(14, f"the clock jumps by {seconds:.0f} s", case)
    for name, number in (("fsync", 0), ("fsync", 1), ("fsync", 4), ("replace", 0), ("replace", 1), ("mkdir", 0)):
        fault = Fault("fail_call", 0, {"name": name, "number": number, "step": 3, "error": errno.EIO})
        yield Case(14, f"EIO from {name} {number}", matrix.recovery("dp2", fault, holds=_failed_save_went_on))
    yield Case(14, "a file where the checkpoints go", lambda session, folder: _no_folder(session, folder))
    yield Case(14, "checkpoints deleted", lambda session, folder: _deleted(session, folder))


def _no_folder(session: Any, folder: Path) -> Any:
    training = session.training(folder, "dp2")
    training.run.mkdir()
    (training.run / "checkpoints").write_text("")
    ended = training.start(changes={"checkpoint": {"failed_saves": 0}})
    assert set(ended.statuses) == {2} and "checkpoints" in ended.output[0], (ended.statuses, ended.output)
    (training.run / "checkpoints").unlink()
    matrix.check(training.start())
    return matrix.compare(session, training, "dp2", Outcome())


def _deleted(session: Any, folder: Path) -> Any:
    training = session.training(folder, "dp2")
    matrix.check(training.start(changes={"training": {"steps": 4}}))
    shutil.rmtree(training.run / "checkpoints")
    assert CheckpointDirectory(training.run / "checkpoints").latest() is None
    matrix.check(training.start())
    return matrix.compare(session, training, "dp2", Outcome())


ROWS = (row_3, row_4, row_5, row_6, row_12, row_13, row_14)
