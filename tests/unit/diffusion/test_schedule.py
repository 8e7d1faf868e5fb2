import pytest
import torch

from megacogvx.diffusion.config import DiffusionConfig
from megacogvx.diffusion.schedule import NoiseSchedule


@pytest.fixture
def schedule():
    return NoiseSchedule(DiffusionConfig())


def test_velocity_and_noisy_latents_give_back_x0(schedule):
    x0, noise = torch.randn(1000, 6), torch.randn(1000, 6)
    t = torch.arange(1000)
    xt, v = schedule.add_noise(x0, noise, t), schedule.velocity(x0, noise, t)
    torch.testing.assert_close(schedule.to_x0(xt, v, t), x0, rtol=0, atol=2e-6)


def test_last_timestep_is_pure_noise(schedule):
    x0, noise = torch.randn(4, 4), torch.randn(4, 4)
    assert torch.equal(schedule.add_noise(x0, noise, 999), noise)
    assert torch.equal(schedule.velocity(x0, noise, 999), -x0)
    assert schedule.alpha(999) == 0.0 and schedule.alpha(-1) == 1.0


def test_bf16_latents_are_mixed_in_fp32(schedule):
    x0, noise = torch.randn(3, 8).bfloat16(), torch.randn(3, 8).bfloat16()
    t = torch.tensor([3, 400, 997])
    mixed = schedule.add_noise(x0, noise, t)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, schedule.add_noise(x0.float(), noise.float(), t))


def test_timesteps_must_lead_the_shape(schedule):
    with pytest.raises(AssertionError, match="don't lead"):
        schedule.add_noise(torch.zeros(3, 8), torch.zeros(3, 8), torch.tensor([1, 2]))
