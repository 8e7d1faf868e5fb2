"""Before each update, whether loss and gradient are numbers, and of the size that they should be.

A bad step is done a second time, on the same packs. If the second result is good, a fault of the machine has passed
and the step goes on with it; if it is as bad, the cause is in the samples or the weights, and the policy decides.
What happened is a row of RUN/guard.jsonl. The loss's history is part of the run's state, so that a resumed run judges
as the uninterrupted one would.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from pydantic import Field, field_validator

from megacogvx.config import Section
from megacogvx.errors import AgreedError

LEAST_HISTORY = 10  # losses before one can be called a spike
SKIP_WINDOW = 100  # steps over which skips are counted


class BadStepError(AgreedError):
    """A step that stays bad ends the run; all ranks raise it at the same step."""


class GuardConfig(Section):
    """Section `guard`: what counts as a bad step, a stuck rank and a slow one, and what happens then.

    Attributes:
        on_bad_step: a step that stays bad when it is done again is left out ("skip": its samples count as seen, the
            weights stay) or ends the run ("stop").
        max_skips: more than this many left out within 100 steps end the run all the same.
        spike_factor: a loss above this many times the median of the last `spike_window` is a spike; None: none is.
        gradient_spike_factor: the same for the gradient's norm before clipping.
        spike_window: steps.
        stuck_seconds: a rank that is this long in one part of a step (reading, computing, validating, saving) is
            stuck: stacks are dumped and the job ends with status 76. None: it waits for ever.
        slow_factor: a rank that takes this many times the median of all ranks is named; None: none is.
        slow_window: steps over which a rank's seconds are taken; it is named after two windows in a row.
        launcher_heartbeats: tell nvidia-resiliency-ext's `ft_launcher`, which must have started the run, that a rank
            goes on (`training/heartbeats.py`).
    """

    on_bad_step: Literal["skip", "stop"] = "skip"
    max_skips: int = Field(3, ge=1)
    spike_factor: float | None = Field(10.0, gt=1)
    gradient_spike_factor: float | None = Field(None, gt=1)
    spike_window: int = Field(50, ge=LEAST_HISTORY)
    stuck_seconds: float | None = Field(1800.0, gt=0)
    slow_factor: float | None = Field(2.0, gt=1)
    slow_window: int = Field(5, ge=1)
    launcher_heartbeats: bool = False

    @field_validator("launcher_heartbeats")
    @classmethod
    def _installed(cls, wanted: bool) -> bool:
        if wanted and importlib.util.find_spec("nvidia_resiliency_ext") is None:
            raise ValueError(
                "the package nvidia-resiliency-ext is not installed; pip install '.[resiliency]', or set it to false"
            )
        return wanted


@dataclass(frozen=True)
class Measured:
    """Loss and gradient of one pass over a step's packs, before the update; equal on all ranks.

    Attributes:
        numbers: the log row: `loss`, and whatever else the step measures.
        grad_norm: L2 norm of the whole gradient before clipping.
        suspects: ids of the samples in the packs whose own loss is not finite; of all packs if none is.
        overflow: the gradient overflowed under a loss scale that has been lowered since. With fp16 weights that is
            how the scale is found: the step is left out, and it is no fault.
        loss_scale: what the loss was multiplied by; 1 but for fp16 weights.
    """

    numbers: dict[str, Any]
    grad_norm: float
    suspects: Callable[[], list[int]]
    overflow: bool = False
    loss_scale: float = 1.0

    @property
    def loss(self) -> float | None:
        """What is watched; without a GAN term, which has either sign and begins in the middle of a run."""
        return self.numbers.get("loss_without_gan", self.numbers.get("loss"))


@dataclass(frozen=True)
class Verdict:
    """What became of a step: whose numbers count, whether the update is taken, and the row for guard.jsonl."""

    measured: Measured
    take: bool
    event: dict[str, Any] | None = None


class Guard:
    """Judges steps. Its state is plain JSON and lies in the run's state.

    Args:
        config: section `guard`.
        state: `losses`, `norms` of the last good steps and `skipped`, the steps that were left out lately; changed
            in place.
    """

    def __init__(self, config: GuardConfig, state: dict[str, Any]) -> None:
        self.config, self.state = config, state
        for name in ("losses", "norms", "skipped"):
            state.setdefault(name, [])

    def judge(self, step: int, measure: Callable[[], Measured]) -> Verdict:
        """Measure a step, a second time if the first looks bad.

        Args:
            step: its number.
            measure: runs all packs forward and backward from cleared gradients; may be called twice.

        Raises:
            DataError: the step stays bad and the policy is to stop, or too many were left out.
        """
        first = measure()
        if first.overflow:
            return Verdict(first, False)
        problem = self.problem(first)
        if problem is None:
            self._remember(first)
            return Verdict(first, True)
        second = measure()
        again = self.problem(second)
        event = {"step": step, "problem": problem, "again": again, "samples": first.suspects()}
        if again is None:
            self._remember(second)
            return Verdict(second, True, event | {"kind": "passing", "action": "taken with the second result"})
        event |= {"kind": "lasting" if again == problem else "unsteady"}
        skipped = self.state["skipped"] = [s for s in self.state["skipped"] if s > step - SKIP_WINDOW] + [step]
        if self.config.on_bad_step == "stop" or len(skipped) > self.config.max_skips:
            return Verdict(second, False, event | {"action": "stopped", "skipped": skipped})
        return Verdict(second, False, event | {"action": "skipped"})

    def problem(self, measured: Measured) -> str | None:
        """Return what is wrong with loss or gradient, or None."""
        pairs = (
            ("loss", measured.loss, "losses", self.config.spike_factor),
            ("gradient norm", measured.grad_norm, "norms", self.config.gradient_spike_factor),
        )
        for name, value, history, factor in pairs:
            if value is None:
                continue
            if not math.isfinite(value):
                return f"{name} is {value}"
            usual = self.state[history]
            if factor is not None and len(usual) >= LEAST_HISTORY and abs(value) > factor * abs(median(usual)):
                return f"{name} is {value:.6g}, over {factor:g} times its median {median(usual):.6g}"
        return None

    def _remember(self, measured: Measured) -> None:
        for name, value in (("losses", measured.loss), ("norms", measured.grad_norm)):
            if value is not None:
                self.state[name] = [*self.state[name], value][-self.config.spike_window :]


def stop_error(event: dict[str, Any]) -> BadStepError:
    """Return the error that ends a run at a bad step."""
    samples = ", ".join(map(str, event["samples"][:8])) + (", ..." if len(event["samples"]) > 8 else "")
    return BadStepError(
        f"step {event['step']} is bad, and bad again when redone ({event['kind']}): {event['problem']}; "
        f"then {event['again']}. Samples: {samples}. The update was not taken; guard.jsonl has all of it. Look at the "
        f"samples, lower optimizer.learning_rate, or set guard.on_bad_step=skip (guard.max_skips)"
    )
