"""What a case of the fault matrix is, and what all of them share: a folder, a run that met no fault, the comparison."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import xxhash

from megacogvx import draws
from megacogvx.testing.fault_points import Fault
from megacogvx.testing.faults import Ended, Training, identical, samples_lost_and_repeated

LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "dp1": (1, {}),
    "dp2": (2, {}),
    "dp4": (4, {}),
    "tp2": (2, {"tensor_parallel_size": 2}),
    "cp2": (2, {"context_parallel_size": 2}),
    "pp2": (2, {"pipeline_parallel_size": 2}),
    "tp2cp2": (4, {"tensor_parallel_size": 2, "context_parallel_size": 2}),
}
LOSS_BOUND = 2e-5  # relative, between layouts


@dataclass
class Outcome:
    """What a case found; `identical` of `compared` runs."""

    injected: int = 1
    recovered: int = 0
    lost: int = 0
    repeated: int = 0
    silent: int = 0
    identical: int = 0
    compared: int = 0
    note: str = ""


@dataclass(frozen=True)
class Case:
    """One line of results.jsonl: a row of the table, a name, and what to do in an empty folder."""

    row: int
    name: str
    run: Callable[[Session, Path], Outcome]


class Session:
    """The folder of all cases; the uninterrupted runs that they are held to are made when first asked for.

    Args:
        folder: kept between calls.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dataset = folder / "dataset"
        self._drop_what_other_code_made()

    def training(self, folder: Path, layout: str) -> Training:
        """Return a run of this layout in `folder`, on the session's dataset."""
        ranks, parallel = LAYOUTS[layout]
        return Training(folder, ranks, parallel, dataset=self.dataset if self.dataset.exists() else self._dataset())

    def reference(self, layout: str) -> Training:
        """Return the uninterrupted run of a layout."""
        training = self.training(self.folder / "references" / layout, layout)
        if not (training.run / "done").exists():
            shutil.rmtree(training.run, ignore_errors=True)
            check(training.start())
            (training.run / "done").touch()
        return training

    def _drop_what_other_code_made(self) -> None:
        """References hold for the code that made them."""
        made_by = self.folder / "made_by"
        if not made_by.exists() or made_by.read_text() != code():
            for name in ("references", "dataset", "held_out"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            made_by.write_text(code())

    def step_seconds(self, layout: str) -> tuple[float, float]:
        """Return the seconds of a step of the uninterrupted run on this machine: the median one and the slowest."""
        seconds = [row["seconds"] for row in self.reference(layout).rows()]
        return median(seconds), max(seconds)

    def _dataset(self) -> Path:
        return Training(self.folder).dataset


@cache
def code() -> str:
    """Return a checksum of all code that a case runs: results and references of other code don't count."""
    root, digest = Path(__file__).parents[2], xxhash.xxh3_64()
    files = sorted(Path(__file__).parent.glob("matrix*.py"))
    for folder in ("megacogvx", "kernels/megacogvx_kernels"):
        files += [file for file in sorted((root / folder).rglob("*")) if file.suffix in (".py", ".so")]
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def check(ended: Ended) -> Ended:
    """Ask that all ranks ended well."""
    assert ended.well, f"{ended.statuses}\n" + "\n".join(ended.output)
    return ended


def compare(session: Session, training: Training, layout: str, outcome: Outcome) -> Outcome:
    """Hold a run that has ended to the uninterrupted one."""
    expected = session.reference(layout)
    problems = identical(training, expected)
    counts = dict(samples_lost_and_repeated(training, expected))
    outcome.lost, outcome.repeated = counts["lost"], counts["repeated"]
    outcome.compared, outcome.identical, outcome.note = 1, int(not problems), "; ".join(problems)
    outcome.recovered = outcome.injected if not problems else 0
    return outcome


def recovery(
    layout: str, *faults: Fault, holds: Callable[[Ended, Training], bool], changes: Any = None
) -> Callable[[Session, Path], Outcome]:
    """Return a case: start with faults, ask that `holds`, start again, and ask for an identical end."""

    def run(session: Session, folder: Path) -> Outcome:
        training = session.training(folder, layout)
        ended = training.start(*faults, changes=changes)
        assert holds(ended, training), f"{ended.statuses} {training.steps()}\n" + "\n".join(ended.output)[-3000:]
        if not ended.well:
            check(training.start())
        return compare(session, training, layout, Outcome())

    return run


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
