"""A stuck rank is found at its limit and named; on an injected clock, and once for real."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest

from megacogvx.training.watch import STUCK_STATUS, Watch


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def ranks(tmp_path):
    """Three ranks in one process, with a clock that goes when it is told to; none has a thread."""
    clock, ended, looking = Clock(), {}, set()

    def look(*which, after=0.0):
        clock.now += after
        for rank in which or range(3):
            if rank not in ended and rank not in looking:
                looking.add(rank)
                watches[rank].look()
                looking.discard(rank)

    alive = [0, 1, 2]
    watches = [
        Watch(
            tmp_path, rank, 3, 60.0, clock=clock, pause=lambda seconds: look(*alive),
            end=lambda status, rank=rank: ended.update({rank: status}),
        )
        for rank in range(3)
    ]  # fmt: skip
    (tmp_path / "ranks").mkdir()
    return watches, look, ended, alive


def test_nobody_is_stuck_before_the_limit_nor_after_a_new_part(ranks):
    watches, look, ended, _ = ranks
    for step in range(5):
        for part in ("data", "step", "save"):
            for watch in watches:
                watch.at(step, part)
            look(after=59.0)
    assert ended == {}


def test_the_rank_behind_is_named_and_all_end(ranks, tmp_path):
    watches, look, ended, _ = ranks
    for rank, watch in enumerate(watches):
        watch.at(7, "data" if rank == 2 else "step")
    for _ in range(7):
        look(after=9.0)
    assert ended == dict.fromkeys(range(3), STUCK_STATUS)
    for rank in range(3):
        report = (tmp_path / "stuck" / f"rank-{rank}.txt").read_text()
        assert "rank 2 is in data of step 7, behind the others" in report.splitlines()[-1]
        assert "test_the_rank_behind_is_named" in report, "the stack"


def test_a_silent_rank_is_named(ranks, tmp_path):
    watches, look, ended, alive = ranks
    for watch in watches:
        watch.at(3, "step")
    look(after=10.0)
    alive.remove(1)
    look(0, 2, after=51.0)
    assert set(ended) == {0, 2}
    for rank in (0, 2):
        last = (tmp_path / "stuck" / f"rank-{rank}.txt").read_text().splitlines()[-1]
        assert last == "rank 1 is silent since step of step 3"


def test_one_stuck_rank_ends_those_that_move_on(ranks):
    watches, look, ended, _ = ranks
    for watch in watches:
        watch.at(0, "step")
    look(after=40.0)
    watches[0].at(1, "data")
    watches[1].at(1, "data")
    look(2, after=21.0)
    look(after=1.0)
    assert ended == dict.fromkeys(range(3), STUCK_STATUS)


def test_a_long_part_that_goes_on_is_not_stuck(ranks):
    """Such as a validation video, whose ranks say after each sampling step that they go on."""
    watches, look, ended, _ = ranks
    for _ in range(5):
        for watch in watches:
            watch.at(3, "validation")
        look(after=40.0)
    assert ended == {}


def test_each_part_is_told_on_though_nothing_is_watched(tmp_path):
    told = []
    watch = Watch(tmp_path, 0, 1, None, on_part=lambda: told.append("on"))
    for part in ("data", "step", "save"):
        watch.at(0, part)
    assert told == ["on"] * 3


def test_what_an_earlier_start_left_is_cleared(ranks, tmp_path):
    _, look, ended, _ = ranks
    (tmp_path / "stuck").mkdir()
    Watch.clear(tmp_path)
    (tmp_path / "ranks").mkdir()
    look(after=1.0)
    assert ended == {}
    assert json.loads((tmp_path / "ranks" / "1.json").read_text())["part"] == "data"


PROGRAM = """
    import sys, time
    from pathlib import Path
    from megacogvx.training.watch import Watch

    def where_it_hangs(how):
        if how == "sleep":
            time.sleep(60)
        import re
        re.match(r"(a|a)*b", "a" * 60)  # never lets go of Python's lock

    with Watch(Path(sys.argv[1]), 0, 1, 0.5) as watch:
        watch.at(0, "step")
        where_it_hangs(sys.argv[2])
"""


@pytest.mark.parametrize(("how", "status"), [("sleep", STUCK_STATUS), ("lock", 1)])
def test_a_real_hang_ends_with_the_stack(tmp_path, how, status):
    words = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(tmp_path), how]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert ended.returncode == status, ended.stderr
    stacks = (tmp_path / "stuck" / "rank-0.txt").read_text() if how == "sleep" else ended.stderr
    assert "where_it_hangs" in stacks
