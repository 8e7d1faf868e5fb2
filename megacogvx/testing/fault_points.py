"""Faults that a test plants in one process of a training: functions that change what it will meet at a certain step.

`training_hooks.py` has the points of a training at which they strike; `faults.py` starts the processes.
"""

from __future__ import annotations

import functools
import os
import re
import resource
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megacogvx.testing.spoiled_numbers import spoil
from megacogvx.testing.training_hooks import before, follow_saves, follow_steps, in_writer, path_of, put

HANG_SECONDS = 120.0


def kill_at(point: str, step: int) -> None:
    """End this process by SIGKILL in step `step`: in forward, backward, reduce or optimizer."""
    here = {"step": -1}
    follow_steps(here)

    def kill(*_: Any, **__: Any) -> None:
        if here["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    before(point, kill)


def kill_at_call(name: str, number: int, step: int) -> None:
    """End this process by SIGKILL before call `number` of `os.<name>`, counted from the save after step `step` on."""
    here = {"saved": 0, "calls": 0}
    follow_saves(here)
    real = getattr(os, name)

    def counted(*arguments: Any, **options: Any) -> Any:
        if here["saved"] > step and "checkpoints" in str(arguments[0] if name != "fsync" else path_of(arguments[0])):
            if here["calls"] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            here["calls"] += 1
        return real(*arguments, **options)

    setattr(os, name, counted)


def fail_writer(step: int) -> None:
    """Let the thread that writes the checkpoint after `step` fail before its first byte."""

    def fail() -> None:
        raise RuntimeError("the writer fails")

    in_writer(step, fail)


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

        put(filesystem_async, "_write_item", counted)

    in_writer(step, kill_after_some)


def hang(how: str, step: int) -> None:
    """Stop this rank in step `step`: "stop" (SIGSTOP), "sleep" (in the loader), "lock" (Python's), "skip"."""
    if how == "sleep":
        _sleep_in_loader(step)
        return
    here = {"step": -1}
    follow_steps(here)

    def strike(*_: Any, **__: Any) -> None:
        if here["step"] != step:
            return
        if how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif how == "lock":
            re.match(r"(a|a)*b", "a" * 200)
        else:  # this rank leaves out a collective in which the others wait
            time.sleep(HANG_SECONDS)

    before("forward" if how != "skip" else "reduce", strike)


def _sleep_in_loader(step: int) -> None:
    from megacogvx.training import setup

    pack_inputs = setup.pack_inputs

    def sleepy(*arguments: Any) -> Iterator[Any]:
        for number, inputs in enumerate(pack_inputs(*arguments)):
            if number == step:
                time.sleep(HANG_SECONDS)
            yield inputs

    put(setup, "pack_inputs", sleepy)


def slow(seconds: float) -> None:
    """Let every forward pass of this rank take so much longer."""
    before("forward", lambda *_, **__: time.sleep(seconds))


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

    put(MetricsFile, "add", full)


def limit_files(size: int, step: int) -> None:
    """Let no file of this process grow beyond `size` bytes from the save after `step` on until the next one begins.

    The save before is complete by then.
    """

    def limit(at: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (at, resource.RLIM_INFINITY))

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limited = {True: size, False: resource.RLIM_INFINITY}
    follow_saves({"saved": 0}, lambda saved: limit(limited[saved == step + 1]))


def fail_call(name: str, step: int, number: int, error: int) -> None:
    """Let call `number` of `os.<name>` on a checkpoint after `step`, by this very process, fail (5 is EIO)."""
    here = {"saved": 0, "calls": 0, "process": os.getpid()}
    follow_saves(here)
    real = getattr(os, name)

    def failing(*arguments: Any, **options: Any) -> Any:
        where = arguments[0] if name != "fsync" else path_of(arguments[0])
        if here["saved"] > step and "checkpoints" in str(where) and os.getpid() == here["process"]:
            here["calls"] += 1
            if here["calls"] == number + 1:
                raise OSError(error, os.strerror(error))
        return real(*arguments, **options)

    setattr(os, name, failing)


def signal_self(names: Sequence[str], step: int, point: str = "forward") -> None:
    """Send this process signals in step `step`, as Slurm or Kubernetes would; at "save" while it is saving."""
    here = {"step": -1, "sent": 0}
    follow_steps(here)

    def send(*_: Any, **__: Any) -> None:
        if here["step"] >= step and not here["sent"]:
            here["sent"] = 1
            for name in names:
                os.kill(os.getpid(), getattr(signal, name))

    before(point, send)


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

    put(loader, "read_pack", failing)


def jump_clock(seconds: float, step: int) -> None:
    """Set the clock of the day forward or back in step `step`, as this process sees it."""
    here = {"step": -1}
    follow_steps(here)
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

    def plant(self) -> None:
        """Plant it in this process."""
        FAULTS[self.name](**self.settings)
