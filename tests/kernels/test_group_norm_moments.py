import pytest
import torch

from megacogvx import draws
from megacogvx.testing.tolerance import assert_close
from megacogvx_kernels.group_norm_moments import group_norm_moments

EPS = 1e-6


def _arguments(channels=12, frames=3):
    x = draws.normal((2, channels, frames, 4, 5), 0, "x") * 2 + 1
    x = x + torch.arange(2 * channels).view(2, channels, 1, 1, 1) / 7  # samples and channels that differ in mean
    weight, bias = draws.normal((channels,), 0, "weight"), draws.normal((channels,), 0, "bias")
    return tuple(tensor.requires_grad_() for tensor in (x, weight, bias))


def _definition(x, weight, bias, groups, activation):
    """Sample by sample, group by group, in fp64."""
    x, weight, bias = x.double(), weight.double(), bias.double()
    samples = []
    for sample in x:
        parts = []
        for part in sample.chunk(groups):
            mean = part.sum() / part.numel()
            variance = (part - mean).square().sum() / part.numel()
            parts.append((part - mean) / torch.sqrt(variance + EPS))
        samples.append(torch.cat(parts) * weight.view(-1, 1, 1, 1) + bias.view(-1, 1, 1, 1))
    y = torch.stack(samples)
    return y * torch.sigmoid(y) if activation else y


@pytest.mark.parametrize("activation", [False, True])
@pytest.mark.parametrize("groups", [1, 4, 12])
def test_equals_the_definition_with_gradients(groups, activation):
    actual, expected = _arguments(), _arguments()
    y = group_norm_moments(*actual, groups, EPS, activation)
    reference = _definition(*expected, groups, activation)
    assert_close(y, reference, 1e-6, "y")
    gradient = draws.normal(tuple(y.shape), 0, "gradient")
    y.backward(gradient)
    reference.backward(gradient.double())
    for name, a, b in zip(("x", "weight", "bias"), actual, expected, strict=True):
        assert_close(a.grad, b.grad, 1e-5, name)


def test_without_a_graph_the_result_is_the_same_and_the_input_untouched():
    x, weight, bias = _arguments()
    before = x.detach().clone()
    expected = group_norm_moments(x, weight, bias, 4, EPS, activation=True)
    with torch.no_grad():
        assert_close(group_norm_moments(x, weight, bias, 4, EPS, activation=True), expected, 1e-6)
    assert torch.equal(x, before)


@pytest.mark.parametrize("activation", [False, True])
def test_without_a_graph_the_result_may_take_the_place_of_x(activation):
    x, weight, bias = _arguments()
    expected = group_norm_moments(x, weight, bias, 4, EPS, activation)
    with torch.no_grad():
        assert group_norm_moments(x, weight, bias, 4, EPS, activation, overwrite=True) is x
    assert_close(x, expected, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_constant_clip_gives_the_bias(dtype):
    x = torch.full((1, 4, 3, 8, 8), 0.1, dtype=dtype, requires_grad=True)
    weight, bias = torch.ones(4, dtype=dtype), torch.arange(4).to(dtype)
    y = group_norm_moments(x, weight, bias, 2, EPS)
    assert_close(y.float(), bias.float().view(1, 4, 1, 1, 1).expand_as(y), 1e-3)
    y.sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"x_BCTHW": torch.zeros(2, 4, 3, 5)}, ValueError, "x_BCTHW"),
        ({"x_BCTHW": torch.zeros(2, 4, 0, 5, 5)}, ValueError, "x_BCTHW"),
        ({"x_BCTHW": torch.zeros(2, 4, 1, 5, 5, dtype=torch.uint8)}, TypeError, "x_BCTHW"),
        ({"weight_C": torch.zeros(3)}, ValueError, "weight_C"),
        ({"bias_C": torch.zeros(4, 1)}, ValueError, "bias_C"),
        ({"groups": 3}, ValueError, "groups=3 must divide the 4 channels"),
        ({"eps": 0.0}, ValueError, "eps=0.0"),
    ],
)
def test_wrong_arguments_are_named(changes, error, named):
    right = {"x_BCTHW": torch.zeros(2, 4, 1, 5, 5), "weight_C": torch.ones(4), "bias_C": torch.zeros(4)}
    with pytest.raises(error, match=named):
        group_norm_moments(**{**right, "groups": 2, "eps": EPS, **changes})
