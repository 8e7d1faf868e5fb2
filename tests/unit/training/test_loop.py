"""The rhythm of the loop: what is called at which step, and that a broken step leaves nothing behind."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from megacogvx.errors import DataError
from megacogvx.training import loop
from megacogvx.training.config import TrainingConfig
from megacogvx.training.metrics import MetricsFile
from megacogvx.training.state import TrainState


class FakeOptimizer:
    """Counts what the loop asks of it; from `bad_from` on the gradient is not finite."""

    lr = 0.5

    def __init__(self, bad_from: int | None = None):
        self.scheduled: list[int] = []
        self.bad_from = bad_from

    def schedule(self, step):
        self.scheduled.append(step)

    def zero_grad(self):
        pass

    def step(self):
        bad = self.bad_from is not None and self.scheduled[-1] >= self.bad_from
        return (False, float("nan")) if bad else (True, 2.0)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of seven steps without a model: each microbatch is its own loss."""
    saved: list[int] = []
    monkeypatch.setattr(
        loop, "forward_backward", lambda step, microbatches, *_, **__: [{"sums": m} for m in microbatches]
    )
    monkeypatch.setattr(loop, "sum_over_tokens", lambda sums, groups: sums * groups.world_size)
    monkeypatch.setattr(loop, "from_last_stage", lambda sums, groups: sums)
    monkeypatch.setattr(loop, "save_checkpoint", lambda run: saved.append(run.state.step))

    def build(start: int = 0, bad_from: int | None = None) -> SimpleNamespace:
        settings = TrainingConfig(steps=7, save_every=3, log_every=2, validate_every=4, run_folder=tmp_path)
        inputs = (
            loop.StepInput(
                [torch.tensor(float(step)), torch.tensor(1.0)], {"samples": 3, "tokens": 100}, {"at": step + 1}
            )
            for step in range(start, 100)
        )
        return SimpleNamespace(
            settings=settings, groups=SimpleNamespace(is_first=True, world_size=2), model=None,
            optimizer=FakeOptimizer(bad_from), state=TrainState(start), inputs=inputs, forward_step=None,
            read_sums=lambda sums: {"loss": sums.item()}, validate=lambda step: {"psnr": 10.0 + step},
            checkpoints=SimpleNamespace(latest=lambda: "the last good one"), metrics=MetricsFile(tmp_path, start, True),
            resolved={"a": 1}, pack_tokens=64, saved=saved, after_step=(), beside={},
        )  # fmt: skip

    return build


def rows(run):
    return [json.loads(line) for line in (run.settings.run_folder / "metrics.jsonl").read_text().splitlines()]


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
    assert seven.state == TrainState(step=7, samples=21, tokens=700, data={"at": 7})


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


def test_gradient_that_is_not_finite_stops_before_anything_is_written(run):
    broken = run(bad_from=4)
    with pytest.raises(DataError, match=r"step 4 is not finite.*the last good one"):
        loop.train(broken)
    assert [row["step"] for row in rows(broken)] == [0, 1, 2, 3]
    assert broken.saved == [3] and broken.state.step == 4


def test_what_follows_the_step_is_called_each_time_and_fills_the_row(run):
    seven = run()
    seven.after_step = (lambda step: {"discriminator": step / 2}, lambda step: {})
    loop.train(seven)
    assert [row["discriminator"] for row in rows(seven)] == [step / 2 for step in range(7)]
