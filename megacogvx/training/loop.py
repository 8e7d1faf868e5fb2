"""The training loop, the same for transformer and VAE: batch to optimizer, then the log, validation and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import yaml

from megacogvx.checkpoint.directory import CheckpointDirectory
from megacogvx.checkpoint.distributed import save
from megacogvx.errors import DataError
from megacogvx.log import get_logger
from megacogvx.parallel.data_parallel import DistributedDataParallel, ForwardStep, forward_backward, sum_over_tokens
from megacogvx.parallel.groups import ParallelGroups
from megacogvx.parallel.optimizer import Optimizer
from megacogvx.parallel.pipeline_parallel import from_last_stage
from megacogvx.training.config import TrainingConfig
from megacogvx.training.metrics import MetricsFile, log_line
from megacogvx.training.state import TrainState

logger = get_logger(__name__)


@dataclass(frozen=True)
class StepInput:
    """What one optimizer step takes.

    Attributes:
        microbatches: this rank's packs, or its share of the clips.
        facts: numbers of the whole step for the log; `samples` and `tokens` also count in the state.
        data_state: the loader's state after this step.
    """

    microbatches: list[Any]
    facts: dict[str, Any]
    data_state: dict[str, Any]


@dataclass
class Run:
    """Everything that a training needs, built once by `setup.py`.

    Attributes:
        settings: section `training`.
        groups, model, optimizer: as `setup.py` made them; `model` is the data-parallel wrapper.
        state: where the run stands; changed by the loop.
        inputs: one `StepInput` a step, from `state.step` on.
        forward_step: what the schedule calls for each microbatch; its metrics hold the local sums `sums`.
        read_sums: turns the sums of all ranks into numbers of the log row.
        validate: step -> numbers measured on held-out data, called on every rank; None: there is nothing held out.
        checkpoints: RUN/checkpoints.
        metrics: RUN/metrics.jsonl.
        resolved: the resolved config, kept in each checkpoint.
        pack_tokens: tokens of each pack; pipeline stages have to know it.
    """

    settings: TrainingConfig
    groups: ParallelGroups
    model: DistributedDataParallel
    optimizer: Optimizer
    state: TrainState
    inputs: Iterator[StepInput]
    forward_step: ForwardStep
    read_sums: Callable[[torch.Tensor], dict[str, Any]]
    validate: Callable[[int], dict[str, float]] | None
    checkpoints: CheckpointDirectory
    metrics: MetricsFile
    resolved: dict[str, Any]
    pack_tokens: int = 1


def train(run: Run) -> None:
    """Train from `run.state.step` to the last step; each step leaves a row in metrics.jsonl.

    Raises:
        DataError: the gradient is not finite; the step was not taken and no checkpoint of it is written.
    """
    if run.state.step >= run.settings.steps:
        logger.info("nothing to do: the run has %d of %d steps", run.state.step, run.settings.steps)
        return
    if run.groups.is_first:
        run.metrics.folder.mkdir(parents=True, exist_ok=True)
        (run.metrics.folder / "config.yaml").write_text(yaml.safe_dump(run.resolved, sort_keys=False))
    meter = _Meter(run.settings.steps - run.state.step)
    for step in range(run.state.step, run.settings.steps):
        inputs = next(run.inputs)
        meter.start_step()
        run.optimizer.schedule(step)
        row = {"step": step, **train_step(run, inputs), **inputs.facts, "lr": run.optimizer.lr}
        _advance(run.state, inputs)
        if run.validate is not None and _is_due(step, run.settings.validate_every, run.settings.steps):
            row |= run.validate(step)
        row |= meter.end_step()
        run.metrics.add(row)
        if _is_due(step, run.settings.log_every, run.settings.steps):
            log_line(row, run.settings.steps, meter.seconds_left())
        if _is_due(step, run.settings.save_every, run.settings.steps):
            save_checkpoint(run)


def train_step(run: Run, inputs: StepInput) -> dict[str, Any]:
    """Take one optimizer step; return the loss (over all ranks) and the gradient's norm before clipping.

    With fp16 weights also `loss_scale`, what the loss of this step was multiplied by, and `skipped`: 1 if the gradient
    overflowed under it, so that the step wasn't taken.

    Raises:
        DataError: the gradient is not finite, and not for a loss scale that could be lowered.
    """
    loss_scale = run.optimizer.loss_scale if run.optimizer.scales_loss else None
    run.optimizer.zero_grad()
    metrics = forward_backward(
        run.forward_step,
        inputs.microbatches,
        run.model,
        run.groups,
        num_microbatches=len(inputs.microbatches),
        pack_tokens=run.pack_tokens,
    )
    taken, gradient_norm = run.optimizer.step()
    if not taken and run.optimizer.lowers_loss_scale:
        logger.warning(
            "step %d is skipped: its gradient overflowed under a loss scale of %g; the next one has %g",
            run.state.step + 1, loss_scale, run.optimizer.loss_scale,
        )  # fmt: skip
    elif not taken:
        raise DataError(
            f"the gradient of step {run.state.step} is not finite (norm {gradient_norm}); the step was not taken. "
            f"Lower optimizer.learning_rate or look at the samples of this step; the last checkpoint is "
            f"{run.checkpoints.latest()}"
        )
    local = torch.stack([metric["sums"] for metric in metrics]).sum(dim=0) if metrics else None
    sums = sum_over_tokens(from_last_stage(local, run.groups), run.groups)
    row = {**run.read_sums(sums), "grad_norm": gradient_norm if taken else None}
    return row if loss_scale is None else {**row, "loss_scale": loss_scale, "skipped": int(not taken)}


def save_checkpoint(run: Run) -> None:
    """Write RUN/checkpoints/step-N with model, optimizer, state and resolved config."""
    extra = {"state": run.state.to_json(), "config": run.resolved}
    texts = {"config.yaml": yaml.safe_dump(run.resolved, sort_keys=False)}
    save(run.checkpoints, run.state.step, run.model, run.optimizer, extra, run.groups, texts=texts)


class _Meter:
    """Seconds of each step, those spent waiting for data, and the time left."""

    def __init__(self, steps: int) -> None:
        self.steps_left, self.steps_done = steps, 0
        self.began = self.last = time.perf_counter()
        self.got_data = self.began

    def start_step(self) -> None:
        self.got_data = time.perf_counter()

    def end_step(self) -> dict[str, float]:
        now = time.perf_counter()
        times = {"seconds": round(now - self.last, 4), "data_wait": round(self.got_data - self.last, 4)}
        self.last = now
        self.steps_done, self.steps_left = self.steps_done + 1, self.steps_left - 1
        return times

    def seconds_left(self) -> float:
        return (self.last - self.began) / max(1, self.steps_done) * self.steps_left


def _is_due(step: int, every: int, steps: int) -> bool:
    return (step + 1) % every == 0 or step + 1 == steps


def _advance(state: TrainState, inputs: StepInput) -> None:
    state.step += 1
    state.samples += inputs.facts.get("samples", 0)
    state.tokens += inputs.facts.get("tokens", 0)
    state.data = inputs.data_state
