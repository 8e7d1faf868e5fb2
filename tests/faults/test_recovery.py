"""Six faults of the full matrix (`make faults`): planted in real processes, recovered, and nothing lost or repeated."""

from __future__ import annotations

import pytest

from megacogvx.testing.fault_points import Fault
from megacogvx.testing.faults import STEPS, Training, identical, samples_lost_and_repeated

pytestmark = pytest.mark.timeout(280)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Training:
    """Two data-parallel ranks, uninterrupted."""
    training = Training(tmp_path_factory.mktemp("reference"))
    ended = training.start()
    assert ended.well, ended.output
    assert training.steps() == [2, 4, 6]
    return training


@pytest.fixture
def training(tmp_path, reference) -> Training:
    return Training(tmp_path, dataset=reference.dataset)


def resumed(training: Training, reference: Training) -> None:
    """Start again without a fault; the run must become what the uninterrupted one is, byte for byte."""
    ended = training.start()
    assert ended.well, ended.output
    assert identical(training, reference) == []
    assert training.steps()[-1] == STEPS


def test_a_rank_killed_in_the_backward_pass(training, reference):
    ended = training.start(Fault("kill_at", 1, {"point": "backward", "step": 3}))
    assert ended.statuses[1] == -9 and ended.statuses[0] not in (0, None), "the peer must not wait"
    assert training.steps() == [2]
    resumed(training, reference)


def test_both_ranks_killed_while_they_write(training, reference):
    ended = training.start(Fault("kill_in_writer", None, {"step": 3}))
    assert ended.statuses == [-9, -9]
    assert training.steps() == [2]
    resumed(training, reference)


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(training, reference):
    assert training.start(changes={"training": {"steps": 4}, "optimizer": {"decay_steps": 100}}).well
    (shard,) = (training.run / "checkpoints" / "step-00000004").glob("__1_0.distcp")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    ended = training.start(changes={"checkpoint": {"on_damaged": "stop"}})
    assert ended.statuses == [2, 2] and shard.name in ended.output[0]
    resumed(training, reference)


def test_a_gradient_that_is_once_not_a_number(training, reference):
    ended = training.start(Fault("spoil", 0, {"what": "gradient", "value": float("nan"), "step": 3}))
    assert ended.well, ended.output
    (event,) = training.rows("guard.jsonl")
    assert (event["step"], event["kind"], len(event["samples"]) > 0) == (3, "passing", True)
    assert identical(training, reference) == []


def test_one_process_sees_the_same_losses_held_out_ones_too(tmp_path, reference):
    alone = Training(tmp_path, 1, dataset=reference.dataset)
    ended = alone.start()
    assert ended.well, ended.output
    for ours, theirs in zip(alone.rows(), reference.rows(), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-5)
    ours, theirs = (one.rows()[-1]["validation_loss_by_timestep"] for one in (alone, reference))
    assert ours == pytest.approx(theirs, rel=2e-5) and ours[0] != ours[1]
    assert samples_lost_and_repeated(alone, reference) == [("lost", 0), ("repeated", 0)]


def test_sigterm_leaves_one_checkpoint_and_status_75(training, reference):
    ended = training.start(Fault("signal_self", 1, {"names": ["SIGTERM"], "step": 2}))
    assert ended.statuses == [75, 75], ended.output
    assert training.steps() == [2, 3]
    resumed(training, reference)


def test_a_rank_that_hangs_in_its_loader_is_found_and_named(training, reference):
    ended = training.start(Fault("hang", 1, {"how": "sleep", "step": 3}), changes={"guard": {"stuck_seconds": 4.0}})
    assert ended.statuses == [76, 76], ended.output
    reports = [(training.run / "stuck" / f"rank-{rank}.txt").read_text() for rank in range(2)]
    for report in reports:
        assert "rank 1 is in data of step 3, behind the others" in report
    assert "sleepy" in reports[1]
    resumed(training, reference)
