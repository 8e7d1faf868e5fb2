"""What the samplers promise beside being equal to diffusers (tests/parity/test_schedule.py)."""

import pytest
import torch

from megacogvx.diffusion.config import DiffusionConfig
from megacogvx.diffusion.samplers import ddim_step, ddim_timesteps, dpm_step, previous_timestep
from megacogvx.diffusion.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule(DiffusionConfig())


def test_timesteps_fall_from_the_noisiest():
    assert ddim_timesteps(4) == [999, 749, 499, 249]
    assert ddim_timesteps(1) == [999] and len(ddim_timesteps(1000)) == 1000
    assert ddim_timesteps(30)[1] == 966


def test_the_stride_is_a_whole_number():
    assert previous_timestep(SCHEDULE, 999, 50) == 979
    assert previous_timestep(SCHEDULE, ddim_timesteps(7)[-1], 7) == 0
    assert previous_timestep(SCHEDULE, ddim_timesteps(50)[-1], 50) == -1


@pytest.mark.parametrize("num_steps", [1, 4, 50])
@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
def test_a_perfect_model_gives_the_clean_latents(sampler, num_steps):
    """A model that knows x0 answers with the velocity that leads there; the last step must arrive."""
    x0, x, last = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), None
    for t in ddim_timesteps(num_steps):
        signal, sigma = SCHEDULE.alpha(t) ** 0.5, (1 - SCHEDULE.alpha(t)) ** 0.5
        v = (signal * x - x0) / sigma
        if sampler == "ddim":
            x = ddim_step(SCHEDULE, v, x, t, num_steps)
        else:
            x, predicted = dpm_step(SCHEDULE, v, x, t, num_steps, torch.randn_like(x), last)
            last = (predicted, t)
    torch.testing.assert_close(x, x0, rtol=0, atol=1e-4)
