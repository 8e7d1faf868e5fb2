import pytest
import torch

from megacogvx.diffusion.guidance import combine, guidance_scale
from megacogvx.diffusion.samplers import ddim_timesteps


def test_combine_extrapolates_in_fp32():
    uncond, cond = torch.randn(4, 4).bfloat16(), torch.randn(4, 4).bfloat16()
    assert torch.equal(combine(uncond, cond, 0.0), uncond.float())
    torch.testing.assert_close(combine(uncond, cond, 1.0), cond.float())
    torch.testing.assert_close(combine(uncond, cond, 6.0), 6 * cond.float() - 5 * uncond.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("timestep", "expected"), [(999, 2.291), (979, 2.544), (499, 1.521), (39, 1.0), (19, 1.123)])
def test_legacy_schedule_has_the_released_values(timestep, expected):
    assert guidance_scale("legacy", 6.0, 0, timestep, 50) == pytest.approx(expected, abs=1e-3)


def test_monotone_schedule_rises_from_1():
    scales = [guidance_scale("monotone", 6.0, step, t, 50) for step, t in enumerate(ddim_timesteps(50))]
    assert scales[0] == 1.0 and scales == sorted(scales) and 6.5 < scales[-1] <= 7.0


def test_constant_schedule():
    assert {guidance_scale("constant", 6.0, step, t, 50) for step, t in enumerate(ddim_timesteps(50))} == {6.0}
