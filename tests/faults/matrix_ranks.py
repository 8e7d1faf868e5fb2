"""Rows of the fault matrix that are about ranks: killed, stuck, slow, told to stop, or resumed on another layout."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from matrix_cases import LAYOUTS, LOSS_BOUND, Case, Outcome, Session, check, compare, recovery

from megacogvx.testing.fault_points import Fault
from megacogvx.testing.faults import Ended, Training, samples_lost_and_repeated


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


ROWS = (row_1, row_2, row_7, row_8, row_9, row_10, row_11)
