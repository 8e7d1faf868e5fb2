"""Bad steps are seen, redone once, told apart and left out; on made-up numbers."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacogvx.training.guard import LEAST_HISTORY, Guard, GuardConfig, Measured, stop_error


def measured(loss=1.0, norm=1.0):
    return Measured({"loss": loss}, norm, lambda: [7, 9])


def results(*values):
    """Return a `measure` that gives these results in turn."""
    left = iter(values)
    return lambda: next(left)


def warm(config=None, losses=(1.0,) * LEAST_HISTORY):
    guard = Guard(config or GuardConfig(), {})
    for step, loss in enumerate(losses):
        assert guard.judge(step, results(measured(loss))).event is None
    return guard


BAD = {
    "nan loss": (measured(loss=math.nan), "loss is nan"),
    "infinite loss": (measured(loss=math.inf), "loss is inf"),
    "nan gradient": (measured(norm=math.nan), "gradient norm is nan"),
    "infinite gradient": (measured(norm=math.inf), "gradient norm is inf"),
    "spike": (measured(loss=10.1), "over 10 times its median"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_passing_fault_is_redone_and_taken(kind):
    bad, problem = BAD[kind]
    verdict = warm().judge(20, results(bad, measured(0.9)))
    assert verdict.take and verdict.measured.numbers == {"loss": 0.9}
    assert verdict.event["kind"] == "passing" and problem in verdict.event["problem"]
    assert verdict.event["samples"] == [7, 9] and verdict.event["again"] is None


@pytest.mark.parametrize("kind", BAD)
def test_a_lasting_fault_is_left_out(kind):
    bad, _ = BAD[kind]
    verdict = warm().judge(20, results(bad, bad))
    assert not verdict.take and verdict.event["kind"] == "lasting" and verdict.event["action"] == "skipped"


def test_two_different_faults_are_unsteady():
    verdict = warm().judge(20, results(measured(math.nan), measured(math.inf)))
    assert not verdict.take and verdict.event["kind"] == "unsteady"


def test_the_policy_can_be_to_stop_at_once():
    guard = warm(GuardConfig(on_bad_step="stop"))
    event = guard.judge(20, results(measured(math.nan), measured(math.nan))).event
    assert event["action"] == "stopped"
    message = str(stop_error(event))
    assert "Samples: 7, 9." in message and "guard.on_bad_step=skip" in message


def test_too_many_left_out_within_a_hundred_steps_stop_the_run():
    nan = measured(math.nan)

    def actions(*steps):
        guard = warm(GuardConfig(max_skips=2))
        return [guard.judge(step, results(nan, nan)).event["action"] for step in steps]

    assert actions(20, 50, 80) == ["skipped", "skipped", "stopped"]
    assert actions(20, 50, 120, 151) == ["skipped"] * 4


def test_an_overflow_that_lowers_the_loss_scale_is_left_out_and_no_fault():
    guard = warm()
    overflow = Measured({"loss": 1.0}, math.nan, lambda: [], overflow=True)
    for step in range(20, 30):
        verdict = guard.judge(step, results(overflow))
        assert not verdict.take and verdict.event is None
    assert guard.state["skipped"] == []


def test_bad_losses_do_not_move_the_median_and_good_ones_do():
    guard = warm()
    for step in range(20, 23):
        guard.judge(step, results(measured(1000.0), measured(1000.0)))
    assert max(guard.state["losses"]) == 1.0
    for step in range(30, 80):
        guard.judge(step, results(measured(9.0)))
    assert guard.problem(measured(11.0)) is None and guard.problem(measured(91.0))
    assert len(guard.state["losses"]) == guard.config.spike_window


def test_nothing_is_a_spike_before_there_is_a_history_or_without_a_factor():
    assert Guard(GuardConfig(), {}).problem(measured(1e9)) is None
    assert warm(GuardConfig(spike_factor=None)).problem(measured(1e9)) is None


def test_gradients_are_judged_when_asked():
    assert warm().problem(measured(norm=50.0)) is None
    assert "gradient norm is 50" in warm(GuardConfig(gradient_spike_factor=20.0)).problem(measured(norm=50.0))


@given(st.lists(st.floats(0.01, 100) | st.just(math.nan), min_size=1, max_size=60), st.integers(0, 60))
def test_a_guard_that_was_saved_and_read_judges_like_one_that_went_on(losses, stop):
    config = GuardConfig(max_skips=100, spike_window=10)

    def judge(guard, step, loss):
        verdict = guard.judge(step, results(measured(loss), measured(loss)))
        return verdict.take, verdict.event and verdict.event["problem"]

    whole, first = Guard(config, {}), Guard(config, {})
    expected = [judge(whole, step, loss) for step, loss in enumerate(losses)]
    actual = [judge(first, step, loss) for step, loss in enumerate(losses[:stop])]
    second = Guard(config, json.loads(json.dumps(first.state)))
    actual += [judge(second, step, loss) for step, loss in enumerate(losses) if step >= stop]
    assert actual == expected and second.state == whole.state


def test_a_gan_term_that_begins_is_no_spike():
    guard = Guard(GuardConfig(spike_factor=2.0), {})
    for step in range(20):
        assert guard.judge(step, lambda: Measured({"loss": 0.2}, 1.0, list)).take
    against = Measured({"loss": -40.0, "loss_without_gan": 0.2}, 1.0, list)
    assert guard.judge(20, lambda: against).event is None
    spike = Measured({"loss": 0.2, "loss_without_gan": 9.0}, 1.0, list)
    assert "loss is 9" in guard.judge(21, lambda: spike).event["problem"]
