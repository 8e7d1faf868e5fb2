"""The noise schedule and the samplers equal diffusers' CogVideoX schedulers."""

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

from megacogvx.diffusion.config import DiffusionConfig
from megacogvx.diffusion.samplers import ddim_step, ddim_timesteps, dpm_step
from megacogvx.diffusion.schedule import NoiseSchedule

SHIFTS = (1.0, 3.0)
STEPS = (50, 25, 30, 7, 4)  # 30 and 7 don't divide 1000: the stride and the next timestep differ


def reference(kind, snr_shift):
    return kind(
        snr_shift_scale=snr_shift,
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        set_alpha_to_one=True,
    )


def schedule(snr_shift):
    return NoiseSchedule(DiffusionConfig(snr_shift=snr_shift))


def network(xt, t):
    """Stand in for a model: any smooth function of latents and timestep."""
    return torch.sin(3.0 * xt + t / 300.0) * 0.7


def close(actual, expected, bound=1e-6):
    assert torch.linalg.norm(actual - expected) <= bound * torch.linalg.norm(expected)
    assert (actual - expected).abs().max() <= 10 * bound * expected.abs().max()


@pytest.mark.parametrize("snr_shift", SHIFTS)
def test_alphas_equal_diffusers(snr_shift):
    expected = reference(CogVideoXDDIMScheduler, snr_shift).alphas_cumprod
    actual = schedule(snr_shift).alphas_cumprod
    assert actual.dtype == torch.float64 and actual[-1] == 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("snr_shift", "published"),
    [
        (1.0, [0.99915, 0.65245702, 0.24101878, 0.032799118, 0.0]),
        (3.0, [0.99745433, 0.38905371, 0.095328101, 0.010838902, 0.0]),
    ],
)
def test_alphas_equal_known_values(snr_shift, published):
    np.testing.assert_allclose(schedule(snr_shift).alphas_cumprod[[0, 250, 500, 750, 999]], published, rtol=5e-8)


@pytest.mark.parametrize("snr_shift", SHIFTS)
def test_noise_and_velocity_equal_diffusers(snr_shift):
    ours, theirs = schedule(snr_shift), reference(CogVideoXDDIMScheduler, snr_shift)
    x0, noise = torch.randn(5, 3, 2, 4, 4), torch.randn(5, 3, 2, 4, 4)
    t = torch.tensor([0, 1, 500, 998, 999])
    close(ours.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t))
    close(ours.velocity(x0, noise, t), theirs.get_velocity(x0, noise, t))


@pytest.mark.parametrize("num_steps", STEPS)
def test_timesteps_equal_diffusers(num_steps):
    theirs = reference(CogVideoXDDIMScheduler, 1.0)
    theirs.set_timesteps(num_steps)
    assert ddim_timesteps(num_steps) == theirs.timesteps.tolist()


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("snr_shift", SHIFTS)
def test_ddim_run_equals_diffusers(snr_shift, num_steps):
    ours, theirs = schedule(snr_shift), reference(CogVideoXDDIMScheduler, snr_shift)
    theirs.set_timesteps(num_steps)
    actual = expected = torch.randn(2, 3, 4, 4)
    for t in ddim_timesteps(num_steps):
        actual = ddim_step(ours, network(actual, t), actual, t, num_steps)
        expected = theirs.step(network(expected, t), t, expected, return_dict=False)[0]
    close(actual, expected, 1e-5)


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("snr_shift", SHIFTS)
def test_dpm_run_equals_diffusers(snr_shift, num_steps, monkeypatch):
    """Both take the same noise; diffusers draws twice in a step and uses the last draw."""
    from diffusers.schedulers import scheduling_dpm_cogvideox

    ours, theirs = schedule(snr_shift), reference(CogVideoXDPMScheduler, snr_shift)
    theirs.set_timesteps(num_steps)
    noises = {t: torch.randn(2, 3, 4, 4) for t in ddim_timesteps(num_steps)}
    at = {}
    monkeypatch.setattr(scheduling_dpm_cogvideox, "randn_tensor", lambda *_, **__: noises[at["t"]])
    actual = expected = torch.randn(2, 3, 4, 4)
    last, old_x0, back = None, None, None
    for t in ddim_timesteps(num_steps):
        actual, x0 = dpm_step(ours, network(actual, t), actual, t, num_steps, noises[t], last)
        last, at["t"] = (x0, t), t
        expected, old_x0 = theirs.step(network(expected, t), old_x0, t, back, expected)
        back = t
    assert torch.isfinite(actual).all()
    close(actual, expected, 1e-5)
