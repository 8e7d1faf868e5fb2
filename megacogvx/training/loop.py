"""The training loop, the same for transformer and VAE: batch to optimizer, then the log, validation and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml

from megacogvx.checkpoint.directory import CheckpointDirectory
from megacogvx.checkpoint.distributed import Kept, save
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
        after_step: what follows the model's optimizer step, called with its number: a discriminator's step, averaged
            weights. Each returns numbers for the log row.
        beside: what else learns and is kept in checkpoints, by name.
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
    after_step: tuple[Callable[[int], dict[str, Any]], ...] = ()
    beside: Mapping[str, Kept] = field(default_factory=dict)


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
        for follow in run.after_step:
            row |= follow(step)
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
    """Take one optimizer step; return the loss (over all ranks) and the gradient's norm before clipping."""
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
    if not taken:
        raise DataError(
            f"the gradient of step {run.state.step} is not finite (norm {gradient_norm}); the step was not taken. "
            f"Lower optimizer.learning_rate or look at the samples of this step; the last checkpoint is "
            f"{run.checkpoints.latest()}"
        )
    local = torch.stack([metric["sums"] for metric in metrics]).sum(dim=0) if metrics else None
    sums = sum_over_tokens(from_last_stage(local, run.groups), run.groups)
    return {**run.read_sums(sums), "grad_norm": gradient_norm}


def save_checkpoint(run: Run) -> None:
    """Write RUN/checkpoints/step-N with model, optimizer, state and resolved config."""
    extra = {"state": run.state.to_json(), "config": run.resolved}
    texts = {"config.yaml": yaml.safe_dump(run.resolved, sort_keys=False)}
    save(run.checkpoints, run.state.step, run.model, run.optimizer, extra, run.groups, texts=texts, beside=run.beside)


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
