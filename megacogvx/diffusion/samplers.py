"""From noise to latents: DDIM, and the stochastic DPM-Solver++ of second order.

Equal to diffusers' CogVideoXDDIMScheduler and CogVideoXDPMScheduler with v-prediction, trailing timesteps and
zero-terminal SNR. Coefficients are computed in fp64 on the host; latents stay fp32.
"""

from __future__ import annotations

import math

import torch

from megacogvx.diffusion.schedule import NoiseSchedule


def ddim_timesteps(num_steps: int, num_train_timesteps: int = 1000) -> list[int]:
    """Return the timesteps of a sampling run, falling, the last one of the schedule first ("trailing").

    `round(T - i * T / num_steps) - 1`; half-way values are rounded to even.
    """
    assert 1 <= num_steps <= num_train_timesteps, f"{num_steps} sampling steps of {num_train_timesteps} timesteps"
    ratio = num_train_timesteps / num_steps
    return [round(num_train_timesteps - step * ratio) - 1 for step in range(num_steps)]


def previous_timestep(schedule: NoiseSchedule, t: int, num_steps: int) -> int:
    """Return where a step from t lands; negative means no noise at all.

    The stride is the whole number T // num_steps, so with a `num_steps` that doesn't divide T a step doesn't land
    exactly on the next timestep, and the last one may stop at t = 0.
    """
    return t - schedule.num_train_timesteps // num_steps


def ddim_step(schedule: NoiseSchedule, v: torch.Tensor, xt: torch.Tensor, t: int, num_steps: int) -> torch.Tensor:
    """Take one deterministic step from timestep t (Song et al. 2021, equation 12 with sigma = 0).

        x' = a xt + (sqrt(abar') - a sqrt(abar)) x0,   a = sqrt((1 - abar') / (1 - abar))

    Args:
        v: predicted velocity, of xt's shape.
        xt: noisy latents at t.

    Returns:
        fp32 latents at `previous_timestep(...)`.
    """
    abar, before = schedule.alpha(t), schedule.alpha(previous_timestep(schedule, t, num_steps))
    a = math.sqrt((1.0 - before) / (1.0 - abar))
    return a * xt.float() + (math.sqrt(before) - a * math.sqrt(abar)) * schedule.to_x0(xt, v, t)


def dpm_step(
    schedule: NoiseSchedule,
    v: torch.Tensor,
    xt: torch.Tensor,
    t: int,
    num_steps: int,
    noise: torch.Tensor,
    last: tuple[torch.Tensor, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take one step of SDE-DPM-Solver++(2M) from timestep t (Lu et al. 2022; lambda is half the log-SNR).

        h = lambda' - lambda
        x' = sqrt((1 - abar') / (1 - abar)) e^-h xt + (1 - e^-2h) sqrt(abar') D + sqrt((1 - abar') (1 - e^-2h)) noise

    D is x0 on the first and on the last step, otherwise `x0 + (x0 - x0_last) / (2 r)` with r the ratio of the last
    step's h to this one's. At t = T - 1 lambda is -infinity, so the first step keeps nothing of xt, and r is infinite
    on the second.

    Args:
        v: predicted velocity, of xt's shape.
        xt: noisy latents at t.
        noise: N(0, 1) of xt's shape, drawn by the caller.
        last: x0 and timestep of the step before; None on the first.

    Returns:
        fp32 latents at `previous_timestep(...)`, and x0, to be handed to the next step.
    """
    target = previous_timestep(schedule, t, num_steps)
    abar, before = schedule.alpha(t), schedule.alpha(target)
    h = _half_log_snr(before) - _half_log_snr(abar)
    x0 = schedule.to_x0(xt, v, t)
    direction = x0
    if last is not None and target >= 0:
        r = (_half_log_snr(abar) - _half_log_snr(schedule.alpha(last[1]))) / h
        direction = x0 + (x0 - last[0]) / (2.0 * r)
    keep = math.sqrt((1.0 - before) / (1.0 - abar)) * math.exp(-h)
    spread = -math.expm1(-2.0 * h)
    x_next = keep * xt.float() + spread * math.sqrt(before) * direction
    return x_next + math.sqrt((1.0 - before) * spread) * noise.float(), x0


def _half_log_snr(abar: float) -> float:
    if abar == 0.0:
        return -math.inf
    return math.inf if abar == 1.0 else 0.5 * math.log(abar / (1.0 - abar))
