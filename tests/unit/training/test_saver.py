"""One save at a time, old checkpoints deleted, failures counted; with saves that only pretend."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megacogvx.checkpoint.config import CheckpointConfig
from megacogvx.errors import AgreedError, CheckpointError
from megacogvx.training import saver as module
from megacogvx.training.saver import Saver


@pytest.fixture
def saver(monkeypatch):
    """Return a function that makes a saver; `events` tells what it did, `fails` names the steps whose save fails."""
    events: list[str] = []

    class Pending:
        def __init__(self, step, fails):
            self.step, self.fails, self.done = step, fails, False

        def is_done(self):
            return self.done

        def finish(self):
            if self.fails:
                raise CheckpointError("disk full")
            events.append(f"finish {self.step}")

    def build(fails=(), early=(), **settings):
        def start_save(directory, step, model, optimizer, extra, groups, *, texts, beside, background, plans):
            if step in early:
                raise CheckpointError("disk full")
            events.append(f"start {step}{'' if background else ' now'}")
            return Pending(step, step in fails)

        monkeypatch.setattr(module, "start_save", start_save)
        directory = SimpleNamespace(
            folder="runs", prune=lambda new, *kept: events.append(f"prune {new} {kept[0]} {kept[1]}") or []
        )
        return Saver(directory, CheckpointConfig(**settings), SimpleNamespace(is_first=True)), events

    return build


def save(saver, step):
    saver.save(step, None, None, {}, {}, {})


def test_the_one_before_is_complete_before_the_next_begins(saver):
    one, events = saver(keep_last=3, keep_every=100)
    for step in (10, 20):
        save(one, step)
        one.poll()
    one.finish()
    one.finish()
    assert events == ["start 10", "finish 10", "prune 10 3 100", "start 20", "finish 20", "prune 20 3 100"]


def test_a_finished_save_is_completed_at_the_next_poll(saver):
    one, events = saver(background=False)
    save(one, 10)
    one._pending.done = True
    one.poll()
    assert events == ["start 10 now", "finish 10", "prune 10 5 None"]


def test_saves_may_fail_as_often_as_allowed_in_a_row(saver):
    one, events = saver(fails=(10, 30), early=(40, 50), failed_saves=2)
    for step in (10, 20, 30, 40):
        save(one, step)
    assert "finish 20" in events
    with pytest.raises(CheckpointError, match=r"3 saves in a row failed, checkpoint\.failed_saves=2 .*disk full"):
        save(one, 50)


def test_no_failure_is_allowed_when_asked(saver):
    one, _ = saver(fails=(10,), failed_saves=0)
    save(one, 10)
    with pytest.raises(CheckpointError, match="disk full"):
        one.finish()


def test_a_run_whose_last_save_failed_does_not_end_well(saver):
    run, _ = saver(fails=(2,), failed_saves=3)
    save(run, 1)
    save(run, 2)
    with pytest.raises(CheckpointError, match="the last save of the run failed"):
        run.close()
    well, events = saver(fails=(1,), failed_saves=3)
    save(well, 1)
    save(well, 2)
    well.close()
    assert "finish 2" in events


def ends_with(error, saver):
    """Leave the saver with a save on its way and this error."""
    with saver:
        save(saver, 10)
        raise error


@pytest.mark.parametrize(("error", "done"), [(AgreedError("no data"), True), (RuntimeError("a bug"), False)])
def test_what_all_ranks_end_with_completes_the_save_on_its_way(saver, error, done):
    """A loader's error that every rank raises ends the run in order; one rank's own error would leave the others."""
    one, events = saver()
    with pytest.raises(type(error)):
        ends_with(error, one)
    assert ("finish 10" in events) == done


def test_a_save_that_fails_at_the_end_does_not_hide_why_it_ended(saver):
    one, _ = saver(fails=(10,), failed_saves=0)
    with pytest.raises(AgreedError, match="no data"):
        ends_with(AgreedError("no data"), one)
