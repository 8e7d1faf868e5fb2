import pytest
import torch
import torch.nn.functional as F

from megacogvx import draws
from megacogvx.models.vae.blocks import Upsample, convolve_doubled, double_frames, halve_frames
from megacogvx.models.vae.frames import FrameSpan
from megacogvx.models.vae.norm import spread
from megacogvx.testing.tolerance import assert_close


def _frames(*values):
    return torch.tensor(values, dtype=torch.float32).view(1, 1, -1, 1, 1)


@pytest.mark.parametrize(
    ("before", "after"),
    [((5,), (5,)), ((1, 3), (2,)), ((7, 1, 3), (7, 2)), ((1, 3, 5, 9), (2, 7)), ((7, 1, 3, 5, 9), (7, 2, 7))],
)
def test_halving_averages_pairs_and_keeps_the_first_of_an_odd_count(before, after):
    assert halve_frames(_frames(*before), FrameSpan.whole(len(before))).flatten().tolist() == list(after)


@pytest.mark.parametrize(("before", "after"), [((5,), (5,)), ((1, 2), (1, 1, 2, 2)), ((1, 2, 3), (1, 2, 2, 3, 3))])
def test_doubling_copies_frames_and_keeps_the_first_of_an_odd_count_single(before, after):
    assert double_frames(_frames(*before), FrameSpan.whole(len(before))).flatten().tolist() == list(after)


@pytest.mark.parametrize(
    ("cells", "total", "frames"),
    [(1, 1, [0]), (2, 8, [0, 0, 0, 0, 1, 1, 1, 1]), (3, 5, [0, 1, 1, 2, 2]), (3, 9, [0, 1, 1, 1, 1, 2, 2, 2, 2])],
)
def test_latents_are_spread_over_the_frames_and_pixels_they_stand_for(cells, total, frames):
    z = draws.normal((1, 2, cells, 2, 3), 0, "z")
    x = draws.normal((1, 2, total, 8, 12), 0, "x")
    product = (x.unflatten(3, (2, -1)) * spread(z, FrameSpan.whole(total), 8, 12)).flatten(3, 4)
    for t in range(total):
        for row in range(8):
            for column in range(12):
                expected = x[..., t, row, column] * z[..., frames[t], row // 4, column // 4]
                assert torch.equal(product[..., t, row, column], expected)


def test_spread_sums_gradients_of_copies():
    z = torch.zeros(1, 1, 3, 1, 2, requires_grad=True)
    (spread(z, FrameSpan.whole(9), 4, 4) + torch.zeros(1, 1, 9, 1, 4, 4)).sum().backward()
    assert_close(z.grad, torch.tensor([8.0, 32.0, 32.0]).view(1, 1, 3, 1, 1).expand_as(z.grad), 1e-6)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (5, 4)])
def test_a_convolution_of_doubled_pixels_equals_the_plain_one(height, width):
    """In fp64, so that nothing hides in rounding; every edge is in the smallest picture."""
    shapes = {"x": (2, 3, height, width), "weight": (4, 3, 3, 3), "bias": (4,)}
    ours, theirs = ([draws.normal(s, 0, n).double().requires_grad_() for n, s in shapes.items()] for _ in range(2))
    actual = convolve_doubled(*ours)
    x, weight, bias = theirs
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0), weight, bias, padding=1)
    assert_close(actual, expected, 1e-14, "result")
    gradient = draws.normal(tuple(expected.shape), 0, "gradient").double()
    actual.backward(gradient)
    expected.backward(gradient)
    for a, b, name in zip(ours, theirs, shapes, strict=True):
        assert_close(a.grad, b.grad, 1e-13, f"gradient of {name}")


def test_bf16_weights_are_not_summed():
    layer = Upsample(4, over_time=False).bfloat16()
    x = draws.normal((1, 4, 2, 3, 3), 0, "x").bfloat16()
    doubled = F.interpolate(x, scale_factor=(1.0, 2.0, 2.0)).transpose(1, 2).flatten(0, 1)
    expected = layer.conv(doubled).unflatten(0, (1, 2)).transpose(1, 2)
    assert torch.equal(layer(x, FrameSpan.whole(2))[0], expected)
