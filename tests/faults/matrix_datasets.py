"""Rows of the fault matrix that are about datasets: damaged, written by killed writers, changed under a run."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from matrix_cases import Case, Outcome, Session, check, compare, flip

from megacogvx import draws
from megacogvx.data.indexed import DatasetWriter, IndexedDataset, finish_dataset
from megacogvx.data.indexed.verify import verify_dataset
from megacogvx.errors import DataError
from megacogvx.testing.fault_points import Fault
from megacogvx.testing.tiny_dataset import SIZES, tiny_encoder, tiny_item, write_tiny_dataset

BIN_FLIPS, INDEX_FLIPS = 2000, 2000
WRITER_KILLS = 200


def row_4() -> Iterator[Case]:
    """Every change to a dataset's files is an error that names the shard, or changes nothing that is read."""
    yield Case(4, f"{BIN_FLIPS} flips of .bin", lambda session, folder: _fuzz_dataset(folder, ".bin", BIN_FLIPS))
    yield Case(4, f"{INDEX_FLIPS} flips of .idx", lambda session, folder: _fuzz_dataset(folder, ".idx", INDEX_FLIPS))
    yield Case(4, "truncated, swapped, missing", lambda session, folder: _break_dataset(folder))


def _content(folder: Path) -> list[Any]:
    dataset = IndexedDataset(folder)
    records = [dataset.sample(number) for number in range(len(dataset))]
    return [(r.sample_id, r.latents.view(-1).tolist(), r.text.view(-1).tolist(), r.metadata_json) for r in records]


def _fuzz_dataset(folder: Path, suffix: str, count: int) -> Outcome:
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


def _break_dataset(folder: Path) -> Outcome:
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


def row_5() -> Iterator[Case]:
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


def _kill_writers(folder: Path) -> Outcome:
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


def full_dataset(folder: Path) -> Outcome:
    """A shard that can't be written is named, and written whole by the next writer."""

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


def row_12() -> Iterator[Case]:
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


def _changed(change: Callable[[Path], Any]) -> Callable[[Session, Path], Outcome]:
    def run(session: Session, folder: Path) -> Outcome:
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
        check(training.start())
        return compare(session, training, "dp2", Outcome())

    return run


ROWS = (row_4, row_5, row_12)
