import math

import torch

from megacogvx import draws
from megacogvx.models.vae import gaussian
from megacogvx.testing.tolerance import assert_close


def _moments():
    return draws.normal((2, 8, 3, 4, 4), 0, "moments")


def test_means_come_first_and_log_variances_are_clamped():
    moments = torch.cat([torch.full((1, 2, 1, 1, 1), 7.0), torch.tensor([-99.0, 99.0]).view(1, 2, 1, 1, 1)], dim=1)
    mean, log_variance = gaussian.split(moments)
    assert mean.flatten().tolist() == [7.0, 7.0]
    assert log_variance.flatten().tolist() == [-30.0, 20.0]
    assert torch.equal(gaussian.mode(moments), mean)


def test_samples_have_the_posterior_s_mean_and_deviation():
    moments, noise = _moments(), draws.normal((2, 4, 3, 4, 4), 0, "noise")
    mean, log_variance = moments[:, :4], moments[:, 4:]
    assert_close(gaussian.sample(moments, noise), mean + log_variance.exp().sqrt() * noise, 1e-6)
    assert torch.equal(gaussian.sample(moments, torch.zeros_like(noise)), mean)


def test_kl_equals_torch_s_and_vanishes_for_the_prior():
    moments = _moments()
    posterior = torch.distributions.Normal(moments[:, :4].double(), (0.5 * moments[:, 4:].double()).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0))
    assert_close(gaussian.kl(moments), expected, 1e-6)
    assert gaussian.kl(torch.zeros(1, 2, 1, 1, 1)).item() == 0.0


def test_kl_is_taken_in_fp32_and_finite_at_the_clamp():
    moments = torch.full((1, 2, 1, 1, 1), 1e4, dtype=torch.bfloat16)
    value = gaussian.kl(moments)
    assert value.dtype == torch.float32
    assert math.isfinite(value.item())
