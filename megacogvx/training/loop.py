"""The training loop, the same for transformer and VAE: batch to optimizer, then the log, validation and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import yaml

from megacogvx.checkpoint.config import CheckpointConfig
from megacogvx.checkpoint.directory import CheckpointDirectory
from megacogvx.checkpoint.run_state import Kept
from megacogvx.errors import CheckpointError
from megacogvx.log import get_logger, progress
from megacogvx.parallel.data_parallel import DistributedDataParallel, ForwardStep, forward_backward, sum_over_tokens
from megacogvx.parallel.groups import ParallelGroups, gather_json
from megacogvx.parallel.optimizer import Optimizer
from megacogvx.parallel.pipeline_parallel import from_last_stage
from megacogvx.training.agreement import agreed
from megacogvx.training.config import TrainingConfig
from megacogvx.training.guard import BadStepError, Guard, GuardConfig, Measured, stop_error
from megacogvx.training.heartbeats import heartbeats
from megacogvx.training.metrics import Meter, MetricsFile, log_line
from megacogvx.training.profiler import profile_window
from megacogvx.training.run_lock import RunLock
from megacogvx.training.saver import Saver
from megacogvx.training.state import TrainState
from megacogvx.training.stop import StopSignal
from megacogvx.training.stragglers import OwnSeconds, Stragglers
from megacogvx.training.tracking import Tracking, TrackingConfig, record_start
from megacogvx.training.watch import Watch

logger = get_logger(__name__)


@dataclass(frozen=True)
class StepInput:
    """What one optimizer step takes.

    Attributes:
        microbatches: this rank's packs, or its share of the clips.
        facts: numbers of the whole step for the log; `samples` and `tokens` also count in the state.
        data_state: the loader's state after this step.
        sample_ids: of each microbatch, for the guard's report.
        bad_samples: those of the run so far, up to this step, as its state keeps them.
        data_seconds: that this rank waited for its own loader, not for that of a slower rank.
    """

    microbatches: list[Any]
    facts: dict[str, Any]
    data_state: dict[str, Any]
    sample_ids: list[list[int]] = field(default_factory=list)
    bad_samples: dict[str, Any] = field(default_factory=dict)
    data_seconds: float = 0.0


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
        validate: (step, alive) -> numbers measured on held-out data, called on every rank; calls `alive` now and then,
            for the watch. None: there is nothing held out.
        checkpoints: RUN/checkpoints.
        metrics: RUN/metrics.jsonl.
        resolved: the resolved config, kept in each checkpoint.
        pack_tokens: tokens of each pack; pipeline stages have to know it.
        checkpoint, guard, tracking: their sections.
        make_videos: (step, alive) -> uint8 frames `[T, H, W, 3]` by name on the first rank, called on every rank after
            `validate`, with `alive` as there. None: none are made.
        stop: whether a signal came; a run that a program starts has its handlers installed.
        before_pass: called before each pass over a step's packs, of which a bad step has two.
        after_step: what follows the model's optimizer step, if it was taken, called with its number: a discriminator's
            step, averaged weights. Each returns numbers for the log row.
        beside: what else learns and is kept in checkpoints, by name.
        lock: of the run folder, on the first rank; held as long as the run is there.
    """

    settings: TrainingConfig
    groups: ParallelGroups
    model: DistributedDataParallel
    optimizer: Optimizer
    state: TrainState
    inputs: Iterator[StepInput]
    forward_step: ForwardStep
    read_sums: Callable[[torch.Tensor], dict[str, Any]]
    validate: Callable[[int, Callable[[], None]], dict[str, Any]] | None
    checkpoints: CheckpointDirectory
    metrics: MetricsFile
    resolved: dict[str, Any]
    pack_tokens: int = 1
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    make_videos: Callable[[int, Callable[[], None]], dict[str, torch.Tensor]] | None = None
    stop: StopSignal = field(default_factory=StopSignal)
    before_pass: tuple[Callable[[], None], ...] = ()
    after_step: tuple[Callable[[int], dict[str, Any]], ...] = ()
    beside: Mapping[str, Kept] = field(default_factory=dict)
    lock: RunLock | None = None


def train(run: Run) -> bool:
    """Train from `run.state.step` to the last step; each step leaves a row in metrics.jsonl.

    Returns:
        whether the last step was reached; False: a signal stopped the run, after a checkpoint.

    Raises:
        AgreedError: a step is bad by `guard`'s rules, its data can't be read or the log can't be written, on any rank;
            no checkpoint of it is written, and the one on its way is completed.
        CheckpointError: more saves in a row failed than `checkpoint.failed_saves`.
    """
    settings, state, groups = run.settings, run.state, run.groups
    if state.step >= settings.steps:
        logger.info("nothing to do: the run has %d of %d steps", state.step, settings.steps)
        return True
    with agreed(groups, f"opening {settings.run_folder}"):
        if groups.is_first:
            _open_folder(run)
        events = MetricsFile(settings.run_folder, state.step, groups.is_first, "guard.jsonl")
        tracking = Tracking(run.tracking, settings.run_folder, state.step, run.resolved, groups.is_first)
    guard, saver = Guard(run.guard, state.guard), Saver(run.checkpoints, run.checkpoint, groups)
    meter = Meter(settings.steps - state.step, groups)
    beats = heartbeats(run.guard.launcher_heartbeats, groups)
    watch = Watch(settings.run_folder, groups.rank, groups.world_size, run.guard.stuck_seconds, on_part=beats.beat)
    run.forward_step = own = OwnSeconds(run.forward_step, groups.device)
    stragglers = Stragglers(run.guard.slow_factor) if run.guard.slow_factor else None
    with beats, watch, tracking, saver, profile_window(run.tracking, settings.run_folder, groups) as profiler:
        for step in progress(range(state.step, settings.steps), "train", plain=False):
            watch.at(step, "data")
            meter.wait_for_data()
            inputs = next(run.inputs)
            meter.start_step()
            watch.at(step, "step")
            run.optimizer.schedule(step)
            row = {"step": step, **_guarded_step(run, inputs, guard, events, saver), **inputs.facts}
            row["lr"] = run.optimizer.lr
            _advance(state, inputs)
            own.end_step(inputs.data_seconds)
            if run.validate is not None and _is_due(step, settings.validate_every, settings.steps):
                row |= _measure_held_out(run, step, watch, tracking)
            row |= meter.end_step(inputs.facts)
            with agreed(groups, "writing the row of a step"):
                run.metrics.add(row)
                tracking.add(row)
            if _is_due(step, settings.log_every, settings.steps):
                log_line(row, settings.steps, meter.seconds_left())
            if stragglers is not None and _is_due(step, run.guard.slow_window, settings.steps):
                name_slow(stragglers.add(gather_json(own.take_window(), groups)), step)
            watch.at(step, "save")
            stopping = run.stop.agreed(groups)
            if stopping or _is_due(step, settings.save_every, settings.steps):
                save_checkpoint(run, saver)
                stopping = run.stop.agreed(groups)  # a signal that came during a save needs no other one
            saver.poll()
            profiler.step()
            if stopping:
                break
        saver.close()
    if state.step < settings.steps:
        who = run.stop.received or "a signal to another rank"
        logger.warning("stopped by %s at step %d of %d", who, state.step, settings.steps)
    return state.step >= settings.steps


def _measure_held_out(run: Run, step: int, watch: Watch, tracking: Tracking) -> dict[str, Any]:
    """Measure on held-out data and show the videos; return numbers for the row."""
    assert run.validate is not None
    alive = partial(watch.at, step, "validation")
    alive()
    numbers = run.validate(step, alive)
    videos = run.make_videos(step, alive) if run.make_videos is not None else {}
    with agreed(run.groups, "writing the validation videos"):
        for name, frames_THWC in videos.items():
            tracking.add_video(name, frames_THWC, step)
    return numbers


def train_step(run: Run, inputs: StepInput, guard: Guard, events: MetricsFile) -> dict[str, Any]:
    """Take one optimizer step if the guard lets it; return the loss over all ranks and the gradient's norm."""
    step = run.state.step
    verdict = guard.judge(step, lambda: _measure(run, inputs))
    numbers = {**verdict.measured.numbers, "grad_norm": verdict.measured.grad_norm}
    if verdict.event is not None:
        with agreed(run.groups, "writing the row of a bad step"):
            events.add(verdict.event)
        if verdict.event["action"] == "stopped":
            raise stop_error(verdict.event)
        if run.groups.is_first:
            logger.warning("bad step: %s", verdict.event)
        numbers["guard"] = f"{verdict.event['kind']}: {verdict.event['action']}"
    if run.optimizer.scales_loss:
        numbers |= {"loss_scale": verdict.measured.loss_scale, "skipped": int(verdict.measured.overflow)}
    if verdict.take:
        run.optimizer.take(verdict.measured.grad_norm)
        for follow in run.after_step:
            numbers |= follow(step)
    return numbers


def _guarded_step(run: Run, inputs: StepInput, guard: Guard, events: MetricsFile, saver: Saver) -> dict[str, Any]:
    """Take the step; if it ends the run, complete the save that is on its way first."""
    try:
        return train_step(run, inputs, guard, events)
    except BadStepError as error:
        try:
            saver.finish()
        except CheckpointError as problem:
            logger.error("%s", problem)
        raise BadStepError(f"{error}; the last checkpoint is {run.checkpoints.latest()}") from None


def save_checkpoint(run: Run, saver: Saver) -> None:
    """Begin RUN/checkpoints/step-N with model, optimizer, state and resolved config."""
    with agreed(run.groups, "bringing the log to disk"):
        run.metrics.sync()
    extra = {"state": run.state.to_json(), "config": run.resolved}
    texts = {"config.yaml": yaml.safe_dump(run.resolved, sort_keys=False)}
    saver.save(run.state.step, run.model, run.optimizer, extra, texts, run.beside)


def name_slow(slow: dict[int, float], step: int) -> None:
    """Warn of slow ranks."""
    for rank, times in slow.items():
        logger.warning("rank %d is slow at step %d: %.1f times the median of all ranks", rank, step, times)


def _measure(run: Run, inputs: StepInput) -> Measured:
    """Run the packs forward and backward; nothing changes but the gradients."""
    for forget in run.before_pass:
        forget()
    loss_scale = run.optimizer.loss_scale
    run.optimizer.zero_grad()
    metrics = forward_backward(
        run.forward_step,
        inputs.microbatches,
        run.model,
        run.groups,
        num_microbatches=len(inputs.microbatches),
        pack_tokens=run.pack_tokens,
    )
    norm = run.optimizer.gradient_norm()
    overflow = not math.isfinite(norm) and run.optimizer.lowers_loss_scale
    if overflow:
        logger.warning(
            "step %d is skipped: its gradient overflowed under a loss scale of %g; the next one has %g",
            run.state.step + 1, loss_scale, run.optimizer.loss_scale,
        )  # fmt: skip
    local = torch.stack([metric["sums"] for metric in metrics]).sum(dim=0) if metrics else None
    sums = sum_over_tokens(from_last_stage(local, run.groups), run.groups)
    return Measured(run.read_sums(sums), norm, lambda: _suspects(inputs, metrics, run.groups), overflow, loss_scale)


def _suspects(inputs: StepInput, metrics: list[Any], groups: ParallelGroups) -> list[int]:
    """Return the ids in the packs of all ranks whose own sums are not finite; without any, the ids of the step."""
    pairs = list(zip(inputs.sample_ids, metrics, strict=False))
    bad = [sample for ids, metric in pairs if not metric["sums"].isfinite().all() for sample in ids]
    every = [sample for ids in inputs.sample_ids for sample in ids]
    found = {sample for ids in gather_json(bad, groups) for sample in ids}
    return sorted(found or {sample for ids in gather_json(every, groups) for sample in ids})


def _open_folder(run: Run) -> None:
    """Write what the run folder says of the run; rank 0."""
    folder = run.metrics.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(run.resolved, sort_keys=False))
    Watch.clear(folder)
    record_start(folder, run.state.step, run.groups)


def _is_due(step: int, every: int, steps: int) -> bool:
    return (step + 1) % every == 0 or step + 1 == steps


def _advance(state: TrainState, inputs: StepInput) -> None:
    state.step += 1
    state.samples += inputs.facts.get("samples", 0)
    state.tokens += inputs.facts.get("tokens", 0)
    state.data, state.bad_samples = inputs.data_state, inputs.bad_samples
