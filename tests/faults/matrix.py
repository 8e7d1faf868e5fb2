"""The fault matrix: every fault planted in real processes, then recovered, and held to the run that met none.

    python tests/faults/matrix.py                     all rows; goes on where it was stopped
    python tests/faults/matrix.py --rows 1 8          some rows
    python tests/faults/matrix.py --minutes 5         no new case after five minutes

Each case appends a row to FOLDER/results.jsonl; the table at the end is made of that file alone. "Identical": weights,
moments, state, loss history and consumed samples equal the uninterrupted run's byte for byte.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import xxhash

from megacogvx.testing.faults import Ended, Fault, Training, identical, samples_lost_and_repeated

LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "dp1": (1, {}),
    "dp2": (2, {}),
    "dp4": (4, {}),
    "tp2": (2, {"tensor_parallel_size": 2}),
    "cp2": (2, {"context_parallel_size": 2}),
    "pp2": (2, {"pipeline_parallel_size": 2}),
    "tp2cp2": (4, {"tensor_parallel_size": 2, "context_parallel_size": 2}),
}
TITLES = {
    1: "kill -9 of a rank", 2: "kill -9 during a save", 3: "damaged checkpoint", 4: "damaged dataset",
    5: "kill -9 of a dataset writer", 6: "disk full", 7: "NaN, Inf, spike", 8: "stuck rank", 9: "slow rank",
    10: "other layout on resume", 11: "SIGTERM, SIGUSR1", 12: "changed dataset", 13: "loader dies",
    14: "clock, folders, EIO",
}  # fmt: skip
LONG = ("dp4", "tp2cp2", "torchrun")  # in the names of cases with four processes or a launcher
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
    files = [Path(__file__), Path(__file__).with_name("matrix_files.py")]
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


def killed(rank: int | None) -> Callable[[Ended, Training], bool]:
    """The rank was killed, and no other ended well or had to be ended."""
    return lambda ended, _: all(
        status == -9 if at == rank or rank is None else status not in (0, None, -9)
        for at, status in enumerate(ended.statuses)
    )


def row_1() -> Iterator[Case]:
    """Each rank killed in each part of a step, on three layouts of two ranks; one rank of four on two."""
    points = ("forward", "backward", "reduce", "optimizer")
    places = [(layout, rank) for layout in ("dp2", "tp2", "cp2") for rank in (0, 1)] + [("dp4", 2), ("tp2cp2", 3)]
    for layout, rank in places:
        for point in points:
            fault = Fault("kill_at", rank, {"point": point, "step": 3})
            yield Case(1, f"{layout} rank {rank} in {point}", recovery(layout, fault, holds=killed(rank)))

    yield Case(1, "torchrun starts the ranks again", _restarted_by_torchrun)


def _restarted_by_torchrun(session: Session, folder: Path) -> Outcome:
    training = session.training(folder, "dp2")
    ended = check(training.start_by_torchrun(Fault("kill_at", 1, {"point": "backward", "step": 3})))
    assert "resumed from" in ended.output[0]
    return compare(session, training, "dp2", Outcome())


def row_2() -> Iterator[Case]:
    """Rank 0 killed before each rename, sync and deletion of a save; ranks killed while writing, writers that fail."""
    now = {"checkpoint": {"background": False}}
    for name, numbers in (("replace", range(3)), ("fsync", range(0, 9, 2)), ("mkdir", range(1))):
        for number in numbers:
            fault = Fault("kill_at_call", 0, {"name": name, "number": number, "step": 3})
            for mode, changes in (("sync", now), ("async", None)):
                yield Case(2, f"{mode}, {name} {number}", recovery("dp2", fault, holds=killed(0), changes=changes))
    pruned = {"checkpoint": {"keep_last": 1}}
    fault = Fault("kill_at_call", 0, {"name": "rmdir", "number": 0, "step": 3})
    yield Case(2, "while an old one is deleted", recovery("dp2", fault, holds=killed(0), changes=pruned))
    for rank in (0, 1, None):
        where = "all ranks" if rank is None else f"rank {rank}"
        writing = Fault("kill_in_writer", rank, {"step": 3})
        yield Case(2, f"{where} while it writes", recovery("dp2", writing, holds=killed(rank)))
        writer = Fault("fail_writer", rank, {"step": 3})
        yield Case(2, f"the writer of {where} fails", recovery("dp2", writer, holds=_lost_one_save))


def _lost_one_save(ended: Ended, training: Training) -> bool:
    return ended.well and "the training goes on" in ended.output[0] and training.steps() == [2, 6]


def row_7() -> Iterator[Case]:
    """Faults of numbers that pass, and that last."""
    kinds = {"loss nan": ("loss", "nan"), "loss inf": ("loss", "inf"), "gradient nan": ("gradient", "nan"),
             "gradient inf": ("gradient", "inf"), "sample nan": ("sample", "nan")}  # fmt: skip
    for name, (what, value) in kinds.items():
        for rank in (0, 1):
            fault = Fault("spoil", rank, {"what": what, "value": float(value), "step": 3})
            yield Case(7, f"{name}, passing, rank {rank}", recovery("dp2", fault, holds=_one_event("passing")))
        lasting = Fault("spoil", 1, {"what": what, "value": float(value), "step": 3, "times": 9})
        yield Case(7, f"{name}, lasting: left out", _left_out(lasting))
        yield Case(7, f"{name}, lasting: stopped", recovery("dp2", lasting, holds=_stopped, changes=STOP))
    spike = {"what": "spike", "value": 100.0, "step": 14}
    yield Case(7, "spike, passing", _spike(Fault("spoil", None, spike), "passing"))
    yield Case(7, "spike, lasting", _spike(Fault("spoil", None, spike | {"times": 9}), "lasting"))


STOP = {"guard": {"on_bad_step": "stop"}}


def _one_event(kind: str) -> Callable[[Ended, Training], bool]:
    def holds(ended: Ended, training: Training) -> bool:
        events = training.rows("guard.jsonl")
        return ended.well and [event["kind"] for event in events] == [kind] and bool(events[0]["samples"])

    return holds


def _stopped(ended: Ended, training: Training) -> bool:
    return ended.statuses == [2, 2] and "is bad" in ended.output[0] and training.steps() == [2]


def _left_out(fault: Fault) -> Callable[[Session, Path], Outcome]:
    def run(session: Session, folder: Path) -> Outcome:
        training = session.training(folder, "dp2")
        ended = check(training.start(fault))
        assert _one_event("lasting")(ended, training), training.rows("guard.jsonl")
        assert [row["step"] for row in training.rows() if "guard" in row] == [3]
        return Outcome(recovered=1)

    return run


def _spike(fault: Fault, kind: str) -> Callable[[Session, Path], Outcome]:
    def run(session: Session, folder: Path) -> Outcome:
        training = session.training(folder, "dp2")
        training.changes = {"training": {"steps": 16, "save_every": 16}}
        assert _one_event(kind)(check(training.start(fault)), training), training.rows("guard.jsonl")
        return Outcome(recovered=1)

    return run


def row_8() -> Iterator[Case]:
    """A rank that stops, sleeps, keeps Python's lock or leaves a collective out; found, named, ended."""
    for how in ("stop", "sleep", "lock", "skip"):
        yield Case(8, how, _hung(how))


def _hung(how: str) -> Callable[[Session, Path], Outcome]:
    def run(session: Session, folder: Path) -> Outcome:
        training = session.training(folder, "dp2")
        limit = max(4.0, 4 * session.step_seconds("dp2")[1])  # seconds; a step that is only slow must not reach it
        fault, changes = Fault("hang", 1, {"how": how, "step": 3}), {"guard": {"stuck_seconds": limit}}
        ended = training.start(fault, changes=changes, grace=limit + 10)
        report = (training.run / "stuck" / "rank-0.txt").read_text()
        assert ended.statuses[0] == 76 and ended.statuses[1] != 0, ended.statuses
        named = "all ranks are in the same place" if how == "skip" else "rank 1 is "
        assert named in report.splitlines()[-1], report
        if how in ("sleep", "skip"):  # both ranks could still write where they stood
            assert {"sleep": "sleepy", "skip": "strike"}[how] in (training.run / "stuck" / "rank-1.txt").read_text()
        if how == "lock":
            assert "strike" in ended.output[1], "faulthandler's stack"
        check(training.start())
        return compare(session, training, "dp2", Outcome())

    return run


def row_9() -> Iterator[Case]:
    """A rank whose passes take longer by far; one real run, the rest is tested on an injected clock."""

    def run(session: Session, folder: Path) -> Outcome:
        training = session.training(folder, "dp2")
        training.changes = {"training": {"steps": 12, "save_every": 12}, "guard": {"slow_factor": 2.0}}
        seconds = max(0.5, 4 * session.step_seconds("dp2")[0])
        ended = check(training.start(Fault("slow", 1, {"seconds": seconds})))
        named = [line for line in ended.output[0].splitlines() if "is slow at step" in line]
        assert named and all("rank 1 is slow" in line for line in named), ended.output[0]
        return Outcome(recovered=1, note=named[0].split("WARNING ")[-1])

    yield Case(9, "rank 1 of two", run)


def row_10() -> Iterator[Case]:
    """Three steps on one layout, the rest on another: the same samples, and the loss to rounding."""
    for first in LAYOUTS:
        for second in LAYOUTS:
            if first != second and "dp4" not in (first, second):
                yield Case(10, f"{first} to {second}", _moved(first, second))
    for other in ("dp1", "dp2", "tp2", "tp2cp2"):
        yield Case(10, f"dp4 to {other}", _moved("dp4", other))
        yield Case(10, f"{other} to dp4", _moved(other, "dp4"))


def _moved(first: str, second: str) -> Callable[[Session, Path], Outcome]:
    def run(session: Session, folder: Path) -> Outcome:
        start, reference = session.folder / "references" / f"{first}-half", session.reference("dp1")
        half = session.training(start, first)
        if not (half.run / "done").exists():
            shutil.rmtree(half.run, ignore_errors=True)
            check(half.start(changes={"training": {"steps": 3, "save_every": 3}}))
            (half.run / "done").touch()
        moved = session.training(folder, second)
        shutil.copytree(half.run, moved.run)
        check(moved.start())
        counts = dict(samples_lost_and_repeated(moved, reference))
        rows = list(zip(moved.rows(), reference.rows(), strict=True))
        worst = max(abs(ours["loss"] / theirs["loss"] - 1) for ours, theirs in rows)
        assert worst <= LOSS_BOUND, f"loss differs by {worst:.2g}"
        return Outcome(1, 1, counts["lost"], counts["repeated"], note=f"loss to {worst:.1g}")

    return run


def row_11() -> Iterator[Case]:
    """One signal, two, and one during a save."""
    for names, point in ((["SIGTERM"], "forward"), (["SIGUSR1"], "forward"), (["SIGTERM", "SIGTERM"], "backward"),
                         (["SIGUSR1", "SIGTERM"], "save")):  # fmt: skip
        for layout in ("dp2", "tp2"):
            fault = Fault("signal_self", 1, {"names": names, "step": 2, "point": point})

            def stopped(ended: Ended, training: Training, point: str = point) -> bool:
                return set(ended.statuses) == {75} and training.steps() == ([2, 4] if point == "save" else [2, 3])

            yield Case(11, f"{' '.join(names)} in {point}, {layout}", recovery(layout, fault, holds=stopped))


def cases() -> list[Case]:
    """Return all cases of all rows; those without processes are in matrix_files.py."""
    from importlib.util import module_from_spec, spec_from_file_location

    rows = [row_1, row_2, row_7, row_8, row_9, row_10, row_11]
    spec = spec_from_file_location("matrix_files", Path(__file__).with_name("matrix_files.py"))
    assert spec is not None and spec.loader is not None
    sys.modules.setdefault("matrix", sys.modules[__name__])
    files = module_from_spec(spec)
    spec.loader.exec_module(files)
    found = [case for row in (*rows, *files.ROWS) for case in row()]
    # The first of each row, the second of each, ..., the long ones last: a call that is stopped early has seen
    # something of every row.
    places = Counter[int]()
    order = {}
    for case in found:
        order[case.row, case.name] = (any(word in case.name for word in LONG), places[case.row], case.row)
        places[case.row] += 1
    assert len(order) == len(found), "two cases of the same name"
    return sorted(found, key=lambda case: order[case.row, case.name])


def table(results: list[dict[str, Any]]) -> str:
    """Return the results as a table, one line a row of the matrix, with the sum."""
    columns = ("injected", "recovered", "lost", "repeated", "silent")
    head = f"{'row':>3}  {'fault':<28}{'cases':>7}{'failed':>8}" + "".join(f"{name:>11}" for name in columns)
    lines = [head + f"{'identical':>13}"]
    for row in [*sorted({result["row"] for result in results}), None]:
        mine = [result for result in results if row in (None, result["row"])]
        sums = {name: sum(result["outcome"][name] for result in mine) for name in (*columns, "identical", "compared")}
        failed = sum(bool(result["error"]) for result in mine)
        title = f"{row:>3}  {TITLES[row]:<28}" if row else f"{'':>3}  {'all':<28}"
        numbers = "".join(f"{sums[name]:>11,}" for name in columns)
        same = f"{sums['identical']} of {sums['compared']}"
        lines.append(f"{title}{len(mine):>7}{failed:>8}{numbers}{same:>13}")
    return "\n".join(lines)


def main() -> int:
    """Run what is left of the matrix, print the table; status 0 if everything asked for has run and recovered."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/faults"))
    parser.add_argument("--rows", type=int, nargs="*", help="only these rows of the table")
    parser.add_argument("--minutes", type=float, default=60.0, help="no new case after so long")
    parser.add_argument("--again", action="store_true", help="drop the results of these rows first")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    file = arguments.folder.resolve() / "results.jsonl"
    results = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    wanted = [case for case in cases() if not arguments.rows or case.row in arguments.rows]
    if arguments.again:
        results = [result for result in results if arguments.rows and result["row"] not in arguments.rows]
    # What failed is tried again, and what other code has done counts no more.
    results = [result for result in results if not result["error"] and result["code"] == code()]
    file.write_text("".join(json.dumps(result) + "\n" for result in results))
    done, end, session = {(result["row"], result["name"]) for result in results}, time.monotonic(), None
    end += arguments.minutes * 60
    for case in wanted:
        if (case.row, case.name) in done or time.monotonic() > end:
            continue
        session = session or Session(file.parent)
        results.append(_run(case, session))
        with file.open("a") as out:
            out.write(json.dumps(results[-1]) + "\n")
    print(table(results))
    left = len(wanted) - sum((result["row"], result["name"]) in {(c.row, c.name) for c in wanted} for result in results)
    bad = sum(bool(result["error"]) for result in results)
    print(f"{left} cases are left" if left else "every case has run", f"; {bad} failed" if bad else "", sep="")
    return int(bool(left or bad))


def _run(case: Case, session: Session) -> dict[str, Any]:
    folder, began, error = session.folder / "case", time.monotonic(), ""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    outcome = Outcome(recovered=0)
    try:
        outcome = case.run(session, folder)
        if outcome.silent or outcome.lost or outcome.repeated or outcome.identical < outcome.compared:
            error = outcome.note or "not recovered"
    except BaseException as caught:  # torch's CheckpointException is no Exception
        if isinstance(caught, KeyboardInterrupt):
            raise
        error = traceback.format_exc()
    seconds = time.monotonic() - began
    print(
        f"{case.row:>3}  {case.name:<44} {seconds:6.1f} s  {'FAILED: ' + error if error else outcome.note}", flush=True
    )
    return {
        "row": case.row,
        "name": case.name,
        "code": code(),
        "seconds": seconds,
        "error": error,
        "outcome": asdict(outcome),
    }


if __name__ == "__main__":
    sys.exit(main())
