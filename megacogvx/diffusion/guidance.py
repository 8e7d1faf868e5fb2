"""Classifier-free guidance: away from the prediction without text, towards the one with text (Ho and Salimans 2022)."""

from __future__ import annotations

import math
from typing import Literal

import torch

GuidanceSchedule = Literal["constant", "legacy", "monotone"]


def combine(uncond: torch.Tensor, cond: torch.Tensor, scale: float) -> torch.Tensor:
    """Return `uncond + scale * (cond - uncond)` in fp32; both are velocities of one shape."""
    return uncond.float() + scale * (cond.float() - uncond.float())


def guidance_scale(schedule: GuidanceSchedule, scale: float, step: int, timestep: int, num_steps: int) -> float:
    """Return the guidance scale of one sampling step.

    - `constant`: `scale`.
    - `monotone`: a ramp from 1 to 1 + scale, `1 + scale * (1 - cos(pi * (step / num_steps)^5)) / 2`.
    - `legacy`: the same formula with `num_steps - timestep` in the place of `step`, as released with CogVideoX.
      Timesteps run from 999 to 0, not from 0 to num_steps, so the value oscillates between 1 and 1 + scale instead of
      rising; results of the released samplers depend on it.

    Args:
        step: index of the sampling step, 0 the noisiest.
        timestep: its timestep.
        num_steps: steps in all.
    """
    if schedule == "constant":
        return scale
    place = step if schedule == "monotone" else num_steps - timestep
    return 1.0 + scale * (1.0 - math.cos(math.pi * (place / num_steps) ** 5)) / 2.0
