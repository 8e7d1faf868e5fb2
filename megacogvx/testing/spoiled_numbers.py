"""The fault of numbers: a loss, a gradient or a sample that isn't finite, or a loss that is far too large."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megacogvx.testing.training_hooks import follow_steps, put


def spoil(what: str, value: float, step: int, times: int = 1) -> None:
    """Make the loss or the gradient of a step `value` (nan, inf), or multiply it; `times`: passes that are spoiled.

    Args:
        what: "loss", "gradient", "sample" (one sample's latents) or "spike" (the loss times `value`).
        value: what it becomes, or is multiplied with.
        step: of the run.
        times: 1 is a fault that has passed when the step is redone; 2 or more is a lasting one.
    """
    here = {"step": -1, "left": times}
    follow_steps(here)

    def strikes() -> bool:
        if here["step"] != step or here["left"] <= 0:
            return False
        here["left"] -= 1
        return True

    if what == "gradient":
        _spoil_gradient(value, strikes)
    elif what == "sample":
        _spoil_sample(value, strikes)
    else:
        _spoil_loss(value, strikes, is_factor=what == "spike")


def _spoil_gradient(value: float, strikes: Callable[[], bool]) -> None:
    from megacogvx.training import loop

    real = loop.forward_backward

    def spoiled(forward_step: Any, microbatches: Any, model: Any, *rest: Any, **options: Any) -> Any:
        result = real(forward_step, microbatches, model, *rest, **options)
        if strikes():
            for parameter in model.parameters():  # one of them at least in this rank's share
                parameter.main_grad.view(-1)[0] = value
        return result

    loop.forward_backward = spoiled


def _spoil_sample(value: float, strikes: Callable[[], bool]) -> None:
    from megacogvx.training.batch import BatchMaker

    prepare = BatchMaker.prepare

    def spoiled(self: BatchMaker, pack: Any, timesteps: list[int]) -> Any:
        batch = prepare(self, pack, timesteps)
        if strikes():
            batch.video_SP[0] = value
        return batch

    put(BatchMaker, "prepare", spoiled)


def _spoil_loss(value: float, strikes: Callable[[], bool], is_factor: bool) -> None:
    from megacogvx.training.step import TransformerStep

    loss = TransformerStep.loss

    def spoiled(self: TransformerStep, batch: Any, prediction: Any) -> Any:
        total, count, sums = loss(self, batch, prediction)
        if strikes():
            factor = value if is_factor else total.new_tensor(value)
            spoiled_sums = sums["sums"].clone()
            spoiled_sums[0] *= factor  # the loss; behind it stands its divisor
            return total * factor, count, {"sums": spoiled_sums}
        return total, count, sums

    put(TransformerStep, "loss", spoiled)
