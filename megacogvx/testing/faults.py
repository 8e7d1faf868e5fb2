"""Trainings of a tiny model on several processes, with one fault planted, as tests and `make faults` start them.

A start is all ranks of one `megacogvx train`, forked from the server that has imported megatron-core. A fault is a
function of this module, called by name in the rank that it is for, which changes what the training will meet at a
certain step: it kills the process, spoils a gradient, fills the disk. Only the processes of that start see it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from megacogvx.testing import spawn
from megacogvx.testing.tiny_dataset import write_tiny_dataset

START_SECONDS = 120.0  # for one start, all of it
PEER_SECONDS = 60.0  # a collective without its peer fails by then at the latest
STEPS = 6
SAVE_EVERY = 2

CONFIG: dict[str, dict[str, Any]] = {
    "model": {
        "preset": "tiny", "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 4,
        "out_channels": 4, "text_embed_dim": 8, "max_text_seq_length": 6,
    },
    "data": {"tokens_per_pack": 64, "packs_per_step": 4},
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0, "decay_steps": 100},
    "training": {"seed": 3, "steps": STEPS, "save_every": SAVE_EVERY},
    "parallel": {"device": "cpu", "timeout_minutes": PEER_SECONDS / 60},
    "guard": {"stuck_seconds": None, "slow_factor": None},
    "tracking": {"tensorboard": False},
}  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """One planted fault.

    Attributes:
        name: a function of `FAULTS`.
        rank: where; None on all ranks.
        settings: its arguments.
    """

    name: str
    rank: int | None = 0
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """How a start ended: exit status by rank (negative: by that signal), its seconds, and what each rank wrote."""

    statuses: list[int | None]
    seconds: float
    output: list[str]

    @property
    def well(self) -> bool:
        """Whether every rank ended with status 0."""
        return all(status == 0 for status in self.statuses)


class Training:
    """One run folder and the starts of its run.

    Args:
        folder: holds the run, its dataset unless another is named, and the ranks' output.
        ranks: processes.
        parallel: the layout, fields of section `parallel`.
        dataset: an indexed dataset; None writes a tiny one.
        changes: settings by section, over `CONFIG`.
    """

    def __init__(
        self,
        folder: Path,
        ranks: int = 2,
        parallel: Mapping[str, Any] | None = None,
        *,
        dataset: Path | None = None,
        changes: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.folder, self.ranks, self.parallel = folder, ranks, dict(parallel or {})
        self.changes = {name: dict(section) for name, section in (changes or {}).items()}
        self.dataset = dataset or folder / "dataset"
        self.run, self.held_out = folder / "run", self.dataset.with_name("held_out")
        if not self.dataset.exists():
            write_tiny_dataset(self.dataset)
            write_tiny_dataset(self.held_out, 8, first_id=9000)

    def config(self, changes: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Any]:
        """Return all settings of a start."""
        values = {name: dict(section) for name, section in CONFIG.items()}
        values["data"]["paths"] = [str(self.dataset)]
        values["validation"] = {"paths": [str(self.held_out)], "timesteps": [100, 900]}
        values["training"]["run_folder"] = str(self.run)
        for section, settings in [("parallel", self.parallel), *self.changes.items(), *(changes or {}).items()]:
            values.setdefault(section, {}).update(settings)
        return values

    def start(
        self,
        *faults: Fault,
        changes: Mapping[str, Mapping[str, Any]] | None = None,
        meanwhile: Callable[[list[ForkServerProcess]], None] | None = None,
    ) -> Ended:
        """Start all ranks and wait until they have ended.

        Args:
            faults: what is planted.
            changes: settings of this start alone.
            meanwhile: called with the processes once they run.
        """
        output = self.folder / "output"
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        config, port, began = self.config(changes), spawn.free_port(), time.monotonic()
        processes = []
        for rank in range(self.ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.ranks, "LOCAL_WORLD_SIZE": self.ranks}
            environment: dict[str, Any] = {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "STARTED": began}
            mine = [fault for fault in faults if fault.rank in (None, rank)]
            processes.append(spawn.server.Process(target=_rank, args=(config, output / str(rank), environment, mine)))
            processes[-1].start()
        if meanwhile is not None:
            meanwhile(processes)
        statuses = _wait(processes, began + START_SECONDS)
        texts = [(output / str(rank)).read_text(errors="replace") for rank in range(self.ranks)]
        return Ended(statuses, time.monotonic() - began, texts)

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints."""
        from megacogvx.checkpoint.directory import CheckpointDirectory

        return CheckpointDirectory(self.run / "checkpoints").steps()

    def rows(self, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
        """Return the rows of a file of the run folder."""
        file = self.run / name
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def identical(actual: Training, expected: Training, step: int = STEPS) -> list[str]:
    """Compare two runs byte for byte: weights, moments and master weights, state, loss history, samples consumed.

    Returns:
        what differs; empty if they are identical.
    """
    from megacogvx.checkpoint.directory import CheckpointDirectory, read_manifest, verify
    from megacogvx.checkpoint.whole import read_state

    ours, theirs = (CheckpointDirectory(one.run / "checkpoints").path(step) for one in (actual, expected))
    if not ours.is_dir():
        return [f"there is no checkpoint of step {step}"]
    verify(ours)
    # `.metadata` holds the folder's name and a random number; `config.yaml` holds the folder's name.
    names = ("common.pt", "distcp")
    files = [
        {name: entry.xxh3 for name, entry in read_manifest(path)[1].items() if name.endswith(names)}
        for path in (ours, theirs)
    ]
    problems = [
        f"{name} differs" for name in files[0].keys() | files[1].keys() if files[0].get(name) != files[1].get(name)
    ]
    if read_state(ours)["state"] != read_state(theirs)["state"]:
        problems.append("the state differs")
    numbers = ("step", "loss", "loss_by_interval", "grad_norm", "lr", "samples", "tokens", "validation_loss")
    histories = [[{name: row.get(name) for name in numbers} for row in one.rows()] for one in (actual, expected)]
    if histories[0] != histories[1]:
        problems.append("the loss history differs")
    return problems + [
        f"{word} {count} samples" for word, count in samples_lost_and_repeated(actual, expected) if count
    ]


def samples_lost_and_repeated(actual: Training, expected: Training) -> list[tuple[str, int]]:
    """Return how many samples the run's history lacks, and has too often, against an uninterrupted run's.

    A step that was done again after a crash counts once, as its last update: the ones before went with the crash.
    """
    ours, theirs = (
        [(step, sample) for step, ids in sorted(_consumed(one).items()) for sample in ids] for one in (actual, expected)
    )
    lost = [pair for pair in theirs if ours.count(pair) < theirs.count(pair)]
    repeated = [pair for pair in ours if ours.count(pair) > theirs.count(pair)]
    return [("lost", len(lost)), ("repeated", len(repeated))]


def _consumed(training: Training) -> dict[int, list[int]]:
    """Return the sample ids of each step's last update, over the data ranks."""
    parts: dict[int, dict[float, dict[int, list[int]]]] = {}
    for file in sorted(training.run.glob("consumed-*.jsonl")):
        for line in file.read_text().splitlines():
            step, started, place, ids = json.loads(line)
            parts.setdefault(step, {}).setdefault(started, {})[place] = ids
    last = {step: starts[max(starts)] for step, starts in parts.items()}
    return {step: sorted(sample for ids in places.values() for sample in ids) for step, places in last.items()}


def _wait(processes: Sequence[ForkServerProcess], end: float) -> list[int | None]:
    """Wait for all ranks; those left when one has failed get some seconds more, as a launcher would give them."""
    while time.monotonic() < end:
        codes = [process.exitcode for process in processes]
        if all(code is not None for code in codes):
            break
        if any(code not in (None, 0) for code in codes):
            end = min(end, time.monotonic() + PEER_SECONDS)
        time.sleep(0.05)
    statuses = [process.exitcode for process in processes]
    for process in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid or 0, signal.SIGKILL)  # with the writers that it may have left
        process.join()
    return statuses


def _rank(config: dict[str, Any], output: Path, environment: Mapping[str, Any], faults: list[Fault]) -> None:
    """Do what `megacogvx train` does, as one rank."""
    os.setsid()
    os.environ.update({name: str(value) for name, value in environment.items()})
    spawn.write_to(output)
    faulthandler.dump_traceback_later(START_SECONDS, exit=True)
    status = 1
    try:
        _note_consumed(Path(config["training"]["run_folder"]), environment["RANK"], environment["STARTED"])
        for fault in faults:
            FAULTS[fault.name](**fault.settings)
        status = _train(config)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _train(config: dict[str, Any]) -> int:
    from megacogvx.cli import USER_ERROR_STATUS
    from megacogvx.config import build_config
    from megacogvx.errors import MegacogvxError
    from megacogvx.training.config import TrainConfig
    from megacogvx.training.train import pretrain

    try:
        pretrain(build_config(TrainConfig, config))
    except MegacogvxError as error:
        print(f"{type(error).__name__}: {error}")
        return USER_ERROR_STATUS
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def _note_consumed(run: Path, rank: int, started: float) -> None:
    """Append the sample ids of each step that this rank has done to RUN/consumed-RANK.jsonl.

    It also asks that no step moves a running generator: a checkpoint holds none, since nothing draws from one.
    """
    import torch
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from megacogvx.training import loop

    advance, generators = loop._advance, list[torch.Tensor]()

    def noted(state: Any, inputs: Any) -> None:
        now = [torch.get_rng_state(), *get_cuda_rng_tracker().get_states().values()]
        assert not generators or all(torch.equal(a, b) for a, b in zip(now, generators, strict=True)), "a draw"
        generators[:] = now
        ids = [sample for ids in inputs.sample_ids for sample in ids]
        first = inputs.microbatches[0][0].place
        with (run / f"consumed-{rank}.jsonl").open("a") as file:
            file.write(json.dumps([state.step, started, first, ids]) + "\n")
        advance(state, inputs)

    loop._advance = noted


# ------------------------------------------------------------------------------------------------------- the faults


def kill_at(point: str, step: int) -> None:
    """End this process by SIGKILL in step `step`: in forward, backward, reduce or optimizer."""
    here = {"step": -1}
    _follow_steps(here)

    def kill(*_: Any, **__: Any) -> None:
        if here["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    _before(point, kill)


def kill_at_call(name: str, number: int, step: int) -> None:
    """End this process by SIGKILL before call `number` of `os.<name>`, counted from the save after step `step` on."""
    here = {"step": -1, "calls": 0}
    _follow_steps(here)
    real = getattr(os, name)

    def counted(*arguments: Any, **options: Any) -> Any:
        if here["step"] >= step and "checkpoints" in str(arguments[0] if name != "fsync" else _path_of(arguments[0])):
            if here["calls"] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            here["calls"] += 1
        return real(*arguments, **options)

    setattr(os, name, counted)


def kill_writer(step: int) -> None:
    """End the child that writes the checkpoint after `step`, by SIGKILL, before its first byte."""
    _in_writer(step, lambda: os.kill(os.getpid(), signal.SIGKILL))


def kill_beside_writer(step: int) -> None:
    """End this process by SIGKILL while its child still writes the checkpoint after `step`."""
    training = os.getpid()

    def kill_and_go_on() -> None:
        os.kill(training, signal.SIGKILL)
        time.sleep(0.2)

    _in_writer(step, kill_and_go_on)


def spoil(what: str, value: float, step: int, times: int = 1) -> None:
    """Make the loss or the gradient of a step `value` (nan, inf), or multiply it; `times`: passes that are spoiled.

    Args:
        what: "loss", "gradient", "sample" (one sample's latents) or "spike" (the loss times `value`).
        value: what it becomes, or is multiplied with.
        step: of the run.
        times: 1 is a fault that has passed when the step is redone; 2 or more is a lasting one.
    """
    import torch

    here = {"step": -1, "left": times}
    _follow_steps(here)

    def strikes() -> bool:
        if here["step"] != step or here["left"] <= 0:
            return False
        here["left"] -= 1
        return True

    if what == "gradient":
        from megacogvx.training import loop

        real = loop.forward_backward

        def spoiled(forward_step: Any, microbatches: Any, model: Any, *rest: Any, **options: Any) -> Any:
            result = real(forward_step, microbatches, model, *rest, **options)
            if strikes():
                for parameter in model.parameters():  # one of them at least in this rank's share
                    parameter.main_grad.view(-1)[0] = value
            return result

        loop.forward_backward = spoiled
        return
    from megacogvx.training.batch import BatchMaker
    from megacogvx.training.step import TransformerStep

    if what == "sample":
        prepare = BatchMaker.prepare

        def with_bad_sample(self: BatchMaker, pack: Any, timesteps: list[int]) -> Any:
            batch = prepare(self, pack, timesteps)
            if strikes():
                batch.video_SP[0] = value
            return batch

        BatchMaker.prepare = with_bad_sample  # type: ignore[method-assign]
        return
    loss = TransformerStep.loss

    def spoiled_loss(self: TransformerStep, batch: Any, prediction: torch.Tensor) -> Any:
        total, count, sums = loss(self, batch, prediction)
        if strikes():
            factor = value if what == "spike" else total.new_tensor(value)
            return total * factor, count, {"sums": sums["sums"] * factor}
        return total, count, sums

    TransformerStep.loss = spoiled_loss  # type: ignore[method-assign]


def hang(how: str, step: int) -> None:
    """Stop this rank in step `step`: "stop" (SIGSTOP), "sleep" (in the loader), "lock" (Python's), "skip"."""
    here = {"step": -1}
    _follow_steps(here)
    if how == "sleep":
        from megacogvx.training import setup

        pack_inputs = setup._pack_inputs

        def sleepy(*arguments: Any) -> Iterator[Any]:
            for number, inputs in enumerate(pack_inputs(*arguments)):
                if number == step:
                    time.sleep(START_SECONDS)
                yield inputs

        setup._pack_inputs = sleepy
        return

    def strike(*_: Any, **__: Any) -> None:
        if here["step"] != step:
            return
        if how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif how == "lock":
            import re

            re.match(r"(a|a)*b", "a" * 200)
        else:  # this rank leaves out a collective in which the others wait
            time.sleep(START_SECONDS)

    _before("forward" if how != "skip" else "reduce", strike)


def slow(seconds: float) -> None:
    """Let every forward pass of this rank take so much longer."""
    _before("forward", lambda *_, **__: time.sleep(seconds))


def limit_files(size: int, step: int) -> None:
    """Let no file of this process grow beyond `size` bytes from the save after `step` until the next step's end."""
    here = {"step": -1}

    def change(now: int) -> None:
        at = resource.RLIM_INFINITY if now != step + 1 else size
        resource.setrlimit(resource.RLIMIT_FSIZE, (at, resource.RLIM_INFINITY))

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _follow_steps(here, change)


def fail_call(name: str, step: int, number: int, error: int) -> None:
    """Let call `number` of `os.<name>` on a checkpoint after `step` fail with the error code (5 is EIO)."""
    here = {"step": -1, "calls": 0}
    _follow_steps(here)
    real = getattr(os, name)

    def failing(*arguments: Any, **options: Any) -> Any:
        if here["step"] >= step and "checkpoints" in str(arguments[0] if name != "fsync" else _path_of(arguments[0])):
            here["calls"] += 1
            if here["calls"] == number + 1:
                raise OSError(error, os.strerror(error))
        return real(*arguments, **options)

    setattr(os, name, failing)


def signal_self(names: Sequence[str], step: int, point: str = "forward") -> None:
    """Send this process signals in step `step`, as Slurm or Kubernetes would; at "save" while it is saving."""
    here = {"step": -1, "sent": 0}
    _follow_steps(here)

    def send(*_: Any, **__: Any) -> None:
        if here["step"] >= step and not here["sent"]:
            here["sent"] = 1
            for name in names:
                os.kill(os.getpid(), getattr(signal, name))

    _before(point, send)


def fail_reading(step: int) -> None:
    """Let the loader's thread fail on a sample of step `step`."""
    from megacogvx.data import loader
    from megacogvx.errors import DataError

    real = loader.read_pack

    def failing(corpus: Any, indices: Any, patch: Any, tokens: int, at: int, place: int) -> Any:
        pack = real(corpus, indices, patch, tokens, at, place)
        if at == step:
            raise DataError(f"sample {pack.layout.samples[0].sample_id} can't be read")
        return pack

    loader.read_pack = failing


def jump_clock(seconds: float, step: int) -> None:
    """Set the clock of the day forward or back in step `step`, as this process sees it."""
    here = {"step": -1}
    _follow_steps(here)
    real, real_ns = time.time, time.time_ns
    time.time = lambda: real() + (seconds if here["step"] >= step else 0.0)
    time.time_ns = lambda: real_ns() + int((seconds if here["step"] >= step else 0.0) * 1e9)


FAULTS: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (
        kill_at, kill_at_call, kill_writer, kill_beside_writer, spoil, hang, slow, limit_files, fail_call, signal_self,
        fail_reading, jump_clock,
    )
}  # fmt: skip


def _follow_steps(here: dict[str, int], then: Callable[[int], None] | None = None) -> None:
    """Keep `here["step"]` at the step that the loop is in; call `then` with each new one."""
    from megacogvx.parallel.optimizer import Optimizer

    schedule = Optimizer.schedule

    def followed(self: Optimizer, step: int) -> float:
        if sys._getframe(1).f_code.co_name == "train":  # not the one at the making of the optimizer
            here["step"] = step
            if then is not None:
                then(step)
        return schedule(self, step)

    Optimizer.schedule = followed  # type: ignore[method-assign]


def _before(point: str, act: Callable[..., None]) -> None:
    """Let `act` run just before a point of the step: forward, backward, reduce, optimizer or save."""
    from megacogvx.checkpoint import distributed
    from megacogvx.parallel import data_parallel, fused_adam
    from megacogvx.training.step import TransformerStep

    def wrap(owner: Any, name: str, *, after: bool = False) -> None:
        real = getattr(owner, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            if not after:
                act()
            result = real(*arguments, **options)
            if after:
                act()
            return result

        setattr(owner, name, wrapped)

    if point == "forward":
        wrap(TransformerStep, "__call__")
    elif point == "reduce":
        wrap(data_parallel, "finalize_model_grads")
    elif point == "optimizer":
        wrap(fused_adam.FusedAdam, "step", after=True)  # this rank's share is new, the others don't have it yet
    elif point == "save":
        wrap(distributed, "_plan_tensors")
    else:
        assert point == "backward", point
        loss = TransformerStep.loss

        def hooked(self: TransformerStep, batch: Any, prediction: Any) -> Any:
            if prediction.requires_grad:
                prediction.register_hook(lambda gradient: act())
            return loss(self, batch, prediction)

        TransformerStep.loss = hooked  # type: ignore[method-assign]


def _in_writer(step: int, act: Callable[[], None]) -> None:
    """Let `act` run in the child that writes the first checkpoint after `step`, before it writes."""
    from megacogvx.checkpoint import writing

    here = {"step": -1}
    _follow_steps(here)
    training, real = os.getpid(), writing._write

    def wrapped(*arguments: Any) -> Any:
        if here["step"] >= step and os.getpid() != training:
            act()
        return real(*arguments)

    writing._write = wrapped


def _path_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")
