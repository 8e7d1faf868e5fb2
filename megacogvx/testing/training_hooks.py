"""Where a planted fault steps into a training: a step, a save, a point within a step, the writer's thread.

They replace functions of the library for the rest of the process, which is a rank that `faults.py` started.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Any


def follow_steps(here: dict[str, int], then: Callable[[int], None] | None = None) -> None:
    """Keep `here["step"]` at the step that the loop is in; call `then` with each new one."""
    from megacogvx.parallel.optimizer import Optimizer

    schedule = Optimizer.schedule

    def followed(self: Optimizer, step: int) -> float:
        if sys._getframe(1).f_code.co_name == "train":  # not the one at the making of the optimizer
            here["step"] = step
            if then is not None:
                then(step)
        return schedule(self, step)

    put(Optimizer, "schedule", followed)


def follow_saves(here: dict[str, int], then: Callable[[int], None] | None = None) -> None:
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

    put(saver, "start_save", followed)


def before(point: str, act: Callable[..., None]) -> None:
    """Let `act` run just before a point of the step: forward, backward, reduce, optimizer or save."""
    from megacogvx.checkpoint import distributed
    from megacogvx.parallel import data_parallel, fused_adam
    from megacogvx.training.step import TransformerStep

    if point == "forward":
        _wrap(TransformerStep, "__call__", act)
    elif point == "backward":
        _in_backward(act)
    elif point == "reduce":
        _wrap(data_parallel, "finalize_model_grads", act)
    elif point == "optimizer":
        _wrap(fused_adam.FusedAdam, "step", act, after=True)  # this rank's share is new, the others don't have it yet
    else:
        assert point == "save", point
        _wrap(distributed, "plan_write", act)


def _wrap(owner: Any, name: str, act: Callable[..., None], *, after: bool = False) -> None:
    """Let `act` run just before a function of the library, or just after it."""
    real = getattr(owner, name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        if not after:
            act()
        result = real(*arguments, **options)
        if after:
            act()
        return result

    put(owner, name, wrapped)


def _in_backward(act: Callable[..., None]) -> None:
    """Let `act` run when the backward pass reaches the prediction."""
    from megacogvx.training.step import TransformerStep

    loss = TransformerStep.loss

    def hooked(self: TransformerStep, batch: Any, prediction: Any) -> Any:
        if prediction.requires_grad:
            prediction.register_hook(lambda gradient: act())
        return loss(self, batch, prediction)

    put(TransformerStep, "loss", hooked)


def in_writer(step: int, act: Callable[[], None]) -> None:
    """Let `act` run in the thread that writes the first checkpoint after `step`, before it writes."""
    from megacogvx.checkpoint import writing

    here = {"saved": 0}
    struck = threading.Event()
    follow_saves(here)
    real = writing._write_shards

    def wrapped(*arguments: Any) -> Any:
        in_the_background = threading.current_thread() is not threading.main_thread()
        if here["saved"] > step and in_the_background and not struck.is_set():
            struck.set()
            act()
        return real(*arguments)

    put(writing, "_write_shards", wrapped)


def put(owner: Any, name: str, value: Any) -> None:
    """Replace a function of the library."""
    setattr(owner, name, value)


def path_of(descriptor: int) -> str:
    """Return the path of an open file."""
    return os.readlink(f"/proc/self/fd/{descriptor}")
