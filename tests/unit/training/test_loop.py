"""The rhythm of the loop: what is called at which step, and that a broken step leaves nothing behind."""

from __future__ import annotations

import json
import signal
from types import SimpleNamespace

import pytest
import torch

from megacogvx.checkpoint.config import CheckpointConfig
from megacogvx.errors import AgreedError, DataError
from megacogvx.training import agreement, loop, stop
from megacogvx.training.config import TrainingConfig
from megacogvx.training.guard import GuardConfig
from megacogvx.training.metrics import MetricsFile
from megacogvx.training.state import TrainState
from megacogvx.training.tracking import TrackingConfig


class FakeOptimizer:
    """Counts what the loop asks of it; from `bad_from` on the gradient is not finite, each time or only the first.

    With `loss_scale` (fp16) that halves the scale, down to 1.
    """

    lr = 0.5

    def __init__(self, bad_from: int | None = None, passing: bool = False, loss_scale: float | None = None):
        self.scheduled: list[int] = []
        self.taken: list[int] = []
        self.bad_from, self.passing, self.asked = bad_from, passing, 0
        self.scales_loss, self.loss_scale = loss_scale is not None, loss_scale or 1.0

    @property
    def lowers_loss_scale(self):
        return self.scales_loss and self.loss_scale > 1.0

    def schedule(self, step):
        self.scheduled.append(step)
        self.asked = 0

    def zero_grad(self):
        pass

    def gradient_norm(self):
        self.asked += 1
        bad = self.bad_from is not None and self.scheduled[-1] >= self.bad_from
        if bad and self.scales_loss:
            self.loss_scale = max(1.0, self.loss_scale / 2)
        return float("nan") if bad and not (self.passing and self.asked > 1) else 2.0

    def take(self, norm):
        assert norm == 2.0
        self.taken.append(self.scheduled[-1])
        return True


class FakeSaver:
    """Stands for the saver: writes down what it is asked."""

    def __init__(self, directory, config, groups):
        self.saved, self.polled, self.finished = directory.saved, 0, False

    def save(self, step, model, optimizer, extra, texts, beside):
        self.saved.append(step)

    def poll(self):
        self.polled += 1

    def finish(self):
        self.finished = True

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.left_with = error

    def close(self):
        self.finish()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of seven steps without a model: each microbatch is its own loss."""
    saved: list[int] = []
    monkeypatch.setattr(
        loop, "forward_backward", lambda step, microbatches, *_, **__: [{"sums": m} for m in microbatches]
    )
    monkeypatch.setattr(loop, "sum_over_tokens", lambda sums, groups: sums * groups.world_size)
    monkeypatch.setattr(loop, "from_last_stage", lambda sums, groups: sums)
    monkeypatch.setattr(loop, "Saver", FakeSaver)
    monkeypatch.setattr(agreement, "any_rank", lambda condition, groups: condition)
    monkeypatch.setattr(agreement, "gather_json", lambda value, groups: [value, (None, False)])
    monkeypatch.setattr(loop, "gather_json", lambda value, groups: [value, value])
    monkeypatch.setattr(stop, "any_rank", lambda condition, groups: condition)

    def build(start: int = 0, bad_from: int | None = None, passing: bool = False, **guard) -> SimpleNamespace:
        settings = TrainingConfig(steps=7, save_every=3, log_every=2, validate_every=4, run_folder=tmp_path)
        inputs = (
            loop.StepInput(
                [torch.tensor(float(step)), torch.tensor(1.0)],
                {"samples": 3, "tokens": 100},
                {"at": step + 1},
                [[10 * step], [10 * step + 1]],
                {"so far": step + 1},
            )
            for step in range(start, 100)
        )
        return SimpleNamespace(
            settings=settings, model=None,
            groups=SimpleNamespace(is_first=True, world_size=2, rank=0, device=torch.device("cpu")),
            optimizer=FakeOptimizer(bad_from, passing), state=TrainState(start), inputs=inputs, forward_step=None,
            read_sums=lambda sums: {"loss": sums.item()}, validate=lambda step, alive: {"psnr": 10.0 + step},
            checkpoints=SimpleNamespace(latest=lambda: "the last good one", saved=saved),
            metrics=MetricsFile(tmp_path, start, True),
            resolved={"a": 1}, pack_tokens=64, saved=saved, stop=stop.StopSignal(), make_videos=None,
            checkpoint=CheckpointConfig(),
            guard=GuardConfig(stuck_seconds=None, **guard), tracking=TrackingConfig(tensorboard=False),
            before_pass=(), after_step=(), beside={},
        )  # fmt: skip

    return build


def rows(run, name="metrics.jsonl"):
    return [json.loads(line) for line in (run.settings.run_folder / name).read_text().splitlines()]


def test_each_step_leaves_one_row_with_the_loss_of_all_microbatches_and_ranks(run):
    seven = run()
    loop.train(seven)
    assert [row["loss"] for row in rows(seven)] == [2.0 * (step + 1.0) for step in range(7)]
    assert seven.optimizer.scheduled == list(range(7))


def test_checkpoints_and_validation_come_when_due_and_at_the_end(run):
    seven = run()
    loop.train(seven)
    assert seven.saved == [3, 6, 7]
    assert [row["step"] for row in rows(seven) if "psnr" in row] == [3, 6]


def test_state_counts_samples_and_keeps_the_loaders_state(run):
    seven = run()
    loop.train(seven)
    assert seven.state == TrainState(
        step=7, samples=21, tokens=700, data={"at": 7}, guard=seven.state.guard, bad_samples={"so far": 7}
    )
    assert seven.state.guard["losses"] == [2.0 * (step + 1.0) for step in range(7)]


def test_resumed_run_starts_at_its_step(run):
    resumed = run(start=5)
    loop.train(resumed)
    assert [row["step"] for row in rows(resumed)] == [5, 6]
    assert resumed.optimizer.scheduled == [5, 6]


def test_finished_run_does_nothing(run):
    done = run(start=7)
    loop.train(done)
    assert done.saved == [] and done.optimizer.scheduled == []
    assert not (done.settings.run_folder / "config.yaml").exists()


def test_a_step_that_stays_bad_stops_before_anything_is_written(run):
    broken = run(bad_from=4, on_bad_step="stop")
    with pytest.raises(DataError, match=r"step 4 is bad.*gradient norm is nan.*Samples: 40, 41\..*the last good one"):
        loop.train(broken)
    assert [row["step"] for row in rows(broken)] == [0, 1, 2, 3]
    assert broken.saved == [3] and broken.state.step == 4 and broken.optimizer.taken == [0, 1, 2, 3]
    assert [row["step"] for row in rows(broken, "guard.jsonl")] == [4]


def test_bad_steps_are_left_out_until_there_are_too_many(run):
    broken = run(bad_from=2, max_skips=3)
    with pytest.raises(DataError, match="step 5 is bad"):
        loop.train(broken)
    assert broken.optimizer.taken == [0, 1]
    assert [row["guard"] for row in rows(broken)[2:]] == ["lasting: skipped"] * 3
    assert [row["grad_norm"] for row in rows(broken)] == [2.0, 2.0, "nan", "nan", "nan"]


def test_a_fault_that_passes_is_taken_and_told(run):
    passing = run(bad_from=6, passing=True)
    assert loop.train(passing)
    assert passing.optimizer.taken == list(range(7)) and passing.saved == [3, 6, 7]
    (event,) = rows(passing, "guard.jsonl")
    assert (event["step"], event["kind"], event["samples"]) == (6, "passing", [60, 61])


@pytest.mark.parametrize("what", ["add", "sync"])
def test_a_log_that_can_t_be_written_on_the_first_rank_ends_all(run, what):
    """The other ranks would wait for the first in the next step; now all know, with a typed error."""
    full = run()

    def fails(*row):
        raise OSError(28, "No space left on device")

    setattr(full.metrics, what, fails)
    with pytest.raises(AgreedError, match=r"rank 0: OSError.*No space left"):
        loop.train(full)
    assert full.state.step == (1 if what == "add" else 3) and full.saved == []


def test_a_signal_leaves_one_checkpoint_after_the_step(run):
    stopped = run()
    inputs = iter(stopped.inputs)

    def signalled():
        for step, one in enumerate(inputs):
            if step == 4:
                stopped.stop._receive(signal.SIGTERM, None)
                stopped.stop._receive(signal.SIGTERM, None)
            yield one

    stopped.inputs = signalled()
    assert not loop.train(stopped)
    assert stopped.saved == [3, 5] and stopped.state.step == 5


def test_a_signal_when_a_save_is_due_leaves_one_checkpoint(run):
    stopped = run(start=2)
    stopped.stop._receive(signal.SIGUSR1, None)
    assert not loop.train(stopped)
    assert stopped.saved == [3]


def test_a_signal_during_a_save_needs_no_other_one(run, monkeypatch):
    stopped = run()

    def saves_and_is_signalled(self, step, *rest):
        self.saved.append(step)
        stopped.stop._receive(signal.SIGUSR1, None)

    monkeypatch.setattr(FakeSaver, "save", saves_and_is_signalled)
    assert not loop.train(stopped)
    assert stopped.saved == [3] and stopped.state.step == 3


def test_the_run_folder_tells_how_the_run_was_started(run):
    loop.train(run())
    resumed = run(start=5)
    loop.train(resumed)
    starts = rows(resumed, "starts.jsonl")
    assert [start["step"] for start in starts] == [0, 5]
    assert starts[0]["versions"]["torch"] == torch.__version__ and starts[0]["ranks"] == 2
    assert (resumed.settings.run_folder / "config.yaml").read_text() == "a: 1\n"


def test_an_overflow_under_the_loss_scale_skips_the_step_and_is_logged(run, monkeypatch):
    warned = []
    monkeypatch.setattr(loop.logger, "warning", lambda text, *values: warned.append(text % values))
    half = run(on_bad_step="stop")
    half.optimizer = FakeOptimizer(bad_from=4, loss_scale=8.0)
    with pytest.raises(DataError, match="step 6 is bad"):  # 8, 4, 2: at 1 there is nothing left to lower
        loop.train(half)
    told = rows(half)
    assert [row["skipped"] for row in told] == [0, 0, 0, 0, 1, 1]
    assert [row["loss_scale"] for row in told] == [8.0, 8.0, 8.0, 8.0, 8.0, 4.0]
    assert [row["grad_norm"] for row in told] == [2.0] * 4 + ["nan"] * 2
    assert warned == [
        "step 5 is skipped: its gradient overflowed under a loss scale of 8; the next one has 4",
        "step 6 is skipped: its gradient overflowed under a loss scale of 4; the next one has 2",
    ]
    assert half.state.step == 6 and half.saved == [3, 6]


def test_what_follows_the_step_is_called_each_time_and_fills_the_row(run):
    seven = run()
    seven.after_step = (lambda step: {"discriminator": step / 2}, lambda step: {})
    loop.train(seven)
    assert [row["discriminator"] for row in rows(seven)] == [step / 2 for step in range(7)]


def test_loss_and_videos_tell_the_watch_that_they_go_on(run, monkeypatch):
    """A validation that takes longer than the watch's limit is no hang."""
    told = []
    monkeypatch.setattr(loop.Watch, "at", lambda self, step, part: told.append((step, part)))

    def make_videos(step, alive):
        alive(), alive()
        return {}

    def validate(step, alive):
        alive()
        return {}

    seven = run()
    seven.validate = validate
    seven.make_videos = make_videos
    loop.train(seven)
    assert [place for place in told if place[1] == "validation"] == [(3, "validation")] * 4 + [(6, "validation")] * 4


def test_a_tracker_that_cannot_be_opened_ends_all_ranks(run, monkeypatch):
    """Only the first rank has one: without a network Weights & Biases fails there alone."""

    def unreachable(*_):
        raise OSError("no route to host")

    monkeypatch.setattr(loop, "Tracking", unreachable)
    with pytest.raises(AgreedError, match=r"opening .* failed: rank 0: OSError: no route to host"):
        loop.train(run())
