"""Tests that run tests on several ranks: what the parent learns of those that fail."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from megacogvx.testing import spawn

FILE = """
from megacogvx.testing.spawn import on_ranks

@on_ranks(2)
def test_first(groups):
    assert groups.data[1] == 2

@on_ranks(2)
def test_fails_on_one_rank(groups):
    print("hello from", groups.rank)
    assert groups.rank == 0

@on_ranks(2)
def test_last(groups, folder):
    assert folder.is_dir()

@on_ranks(2, slow=True)
def test_slow(groups):
    assert False, "nobody asked for it"
"""


def test_ranks_on_gpus_are_not_forked_from_a_process_that_may_have_started_cuda(monkeypatch):
    started = []
    for context in spawn.CONTEXTS.values():
        start = partial(started.append, context.get_start_method())
        monkeypatch.setattr(context, "Process", lambda start=start, **options: SimpleNamespace(start=start))
    for device in ("cuda", "cpu"):
        spawn._start("file", device, [], 0, 2, 1, Path())
    assert started == ["spawn", "forkserver"]


def test_under_torchrun_a_failure_ends_the_pytest_of_its_rank_and_other_sizes_are_skipped(monkeypatch):
    """Whose end makes torchrun end the others; they may wait in an exchange for a rank that has gone on."""

    def fails(case):
        raise AssertionError("wrong here alone")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(spawn, "_run_case", fails)
    test, session = spawn.on_ranks(2)(fails), SimpleNamespace(shouldfail=False)
    with pytest.raises(AssertionError, match="wrong here alone"):
        test(spawn.Case(fails, {}, "cpu"), SimpleNamespace(session=session))
    assert session.shouldfail == "fails[dp] failed on this rank"
    square = spawn.Case(fails, {"tensor_parallel_size": 2, "context_parallel_size": 2}, "cpu")
    with pytest.raises(pytest.skip.Exception, match="tp2-cp2 needs 4 ranks, not 2"):
        spawn.on_ranks(4)(fails)(square, SimpleNamespace(session=session))


def test_a_failure_takes_only_its_own_test_with_it(tmp_path):
    file = tmp_path / "test_of_ranks.py"
    file.write_text(FILE)
    spawn._load(str(file))
    place = (str(file), 2, "cpu")
    cases = {case.function.__name__: case for case in spawn._cases[place] if not case.is_slow}
    outcomes = {name: spawn._outcome(str(file), 2, case) for name, case in cases.items()}
    assert outcomes["test_first"] == "" and outcomes["test_last"] == ""
    for shown in ("rank 1, exit status 1", "hello from 1", "assert groups.rank == 0"):
        assert shown in outcomes["test_fails_on_one_rank"]
    assert set(spawn._outcomes[place]) == {f"{name}[dp]" for name in outcomes}, "slow tests run with slow ones alone"
    assert [mark.name for mark in spawn.sys.modules[file.stem].test_slow.pytestmark].count("slow") == 1
