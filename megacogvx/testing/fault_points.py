"""Faults that a test plants in one process of a training: functions that change what it will meet at a certain step.

They replace functions of the library for the rest of the process, which is a rank that `faults.py` started.
"""

from __future__ import annotations

import functools
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

HANG_SECONDS = 120.0


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
    here = {"saved": 0, "calls": 0}
    _follow_saves(here)
    real = getattr(os, name)

    def counted(*arguments: Any, **options: Any) -> Any:
        if here["saved"] > step and "checkpoints" in str(arguments[0] if name != "fsync" else _path_of(arguments[0])):
            if here["calls"] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            here["calls"] += 1
        return real(*arguments, **options)

    setattr(os, name, counted)


def fail_writer(step: int) -> None:
    """Let the thread that writes the checkpoint after `step` fail before its first byte."""

    def fail() -> None:
        raise RuntimeError("the writer fails")

    _in_writer(step, fail)


def kill_in_writer(step: int) -> None:
    """End this process by SIGKILL while the training goes on and its thread writes the checkpoint after `step`."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    write_item = filesystem_async._write_item

    def kill_after_some() -> None:
        left = [20]  # tensors

        @functools.wraps(write_item)  # megatron-core looks at its parameters
        def counted(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return write_item(*arguments, **options)

        _put(filesystem_async, "_write_item", counted)

    _in_writer(step, kill_after_some)


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
            spoiled = sums["sums"].clone()
            spoiled[0] *= factor  # the loss; behind it stands its divisor
            return total * factor, count, {"sums": spoiled}
        return total, count, sums

    _put(TransformerStep, "loss", spoiled_loss)


def hang(how: str, step: int) -> None:
    """Stop this rank in step `step`: "stop" (SIGSTOP), "sleep" (in the loader), "lock" (Python's), "skip"."""
    here = {"step": -1}
    _follow_steps(here)
    if how == "sleep":
        from megacogvx.training import setup

        pack_inputs = setup.pack_inputs

        def sleepy(*arguments: Any) -> Iterator[Any]:
            for number, inputs in enumerate(pack_inputs(*arguments)):
                if number == step:
                    time.sleep(HANG_SECONDS)
                yield inputs

        _put(setup, "pack_inputs", sleepy)
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
            time.sleep(HANG_SECONDS)

    _before("forward" if how != "skip" else "reduce", strike)


def slow(seconds: float) -> None:
    """Let every forward pass of this rank take so much longer."""
    _before("forward", lambda *_, **__: time.sleep(seconds))


def fill_log(step: int) -> None:
    """Let the disk be full for metrics.jsonl when it takes the row of `step`: for that moment it is /dev/full."""
    from megacogvx.training.metrics import MetricsFile

    add = MetricsFile.add

    def full(self: MetricsFile, row: dict[str, Any]) -> None:
        if row["step"] != step or not self.writes or self.path.name != "metrics.jsonl":
            return add(self, row)
        kept = self.path.with_suffix(".kept")
        os.rename(self.path, kept)
        self.path.symlink_to("/dev/full")
        try:
            return add(self, row)
        finally:
            os.rename(kept, self.path)

    MetricsFile.add = full  # type: ignore[method-assign]


def limit_files(size: int, step: int) -> None:
    """Let no file of this process grow beyond `size` bytes from the save after `step` on until the next one begins.

    The save before is complete by then.
    """

    def limit(at: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (at, resource.RLIM_INFINITY))

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limited = {True: size, False: resource.RLIM_INFINITY}
    _follow_saves({"saved": 0}, lambda saved: limit(limited[saved == step + 1]))


def fail_call(name: str, step: int, number: int, error: int) -> None:
    """Let call `number` of `os.<name>` on a checkpoint after `step`, by this very process, fail (5 is EIO)."""
    here = {"saved": 0, "calls": 0, "process": os.getpid()}
    _follow_saves(here)
    real = getattr(os, name)

    def failing(*arguments: Any, **options: Any) -> Any:
        where = arguments[0] if name != "fsync" else _path_of(arguments[0])
        if here["saved"] > step and "checkpoints" in str(where) and os.getpid() == here["process"]:
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

    def failing(*arguments: Any, **options: Any) -> Any:
        pack = real(*arguments, **options)
        if pack.step == step:
            raise DataError(f"sample {pack.layout.samples[0].sample_id} can't be read")
        return pack

    _put(loader, "read_pack", failing)


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
        kill_at, kill_at_call, fail_writer, kill_in_writer, spoil, hang, slow, limit_files, fail_call, signal_self,
        fail_reading, jump_clock, fill_log,
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


def _follow_saves(here: dict[str, int], then: Callable[[int], None] | None = None) -> None:
    """Keep `here["saved"]` at the step of the save that was begun last, as its folder calls it; then call `then`.

    A save in the background is completed some steps later: what a step's number tells of it depends on the machine.
    """
    from megacogvx.training import saver

    start = saver.start_save

    def followed(directory: Any, step: int, *arguments: Any, **options: Any) -> Any:
        here["saved"] = step
        if then is not None:
            then(step)
        return start(directory, step, *arguments, **options)

    _put(saver, "start_save", followed)


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
        wrap(distributed, "plan_write")
    else:
        assert point == "backward", point
        loss = TransformerStep.loss

        def hooked(self: TransformerStep, batch: Any, prediction: Any) -> Any:
            if prediction.requires_grad:
                prediction.register_hook(lambda gradient: act())
            return loss(self, batch, prediction)

        _put(TransformerStep, "loss", hooked)


def _in_writer(step: int, act: Callable[[], None]) -> None:
    """Let `act` run in the thread that writes the first checkpoint after `step`, before it writes."""
    from megacogvx.checkpoint import writing

    here = {"saved": 0}
    struck = threading.Event()
    _follow_saves(here)
    real = writing._write_shards

    def wrapped(*arguments: Any) -> Any:
        in_the_background = threading.current_thread() is not threading.main_thread()
        if here["saved"] > step and in_the_background and not struck.is_set():
            struck.set()
            act()
        return real(*arguments)

    _put(writing, "_write_shards", wrapped)


def _put(owner: Any, name: str, value: Any) -> None:
    """Replace a function of the library."""
    setattr(owner, name, value)


def _path_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")
