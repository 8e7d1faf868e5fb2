"""Two frames at a time equal one at a time, for every length, through the layer and through the model."""

import pytest
import torch
import torch.nn.functional as F

from megacogvx import draws
from megacogvx.config import build_config
from megacogvx.models.vae import CHUNKED, WHOLE, CogVideoXVAE, VAEConfig, initialize_weights
from megacogvx.models.vae.causal_conv import CausalConv3d
from megacogvx.models.vae.frames import FrameSpan
from megacogvx.models.vae.winograd import FEWEST_CHANNELS, convolve_pairs, pair_kernels, pays
from megacogvx.testing.tolerance import assert_close


@pytest.fixture
def in_pairs(monkeypatch):
    """Let the narrowest convolution work in pairs, and return the lengths that were convolved so."""
    lengths = []

    def count(padded_BCTHW, weight, kernels, bias):
        lengths.append(padded_BCTHW.shape[2] - 2)
        return convolve_pairs(padded_BCTHW, weight, kernels, bias)

    monkeypatch.setattr("megacogvx.models.vae.winograd.FEWEST_CHANNELS", 1)
    monkeypatch.setattr("megacogvx.models.vae.causal_conv.convolve_pairs", count)
    return lengths


@pytest.mark.parametrize("frames", range(1, 8))
@pytest.mark.parametrize("with_bias", [True, False])
def test_frames_in_pairs_equal_the_plain_convolution(frames, with_bias):
    x = draws.normal((2, 3, frames + 2, 4, 5), 0, "x").double()
    weight, bias = draws.normal((4, 3, 3, 3, 3), 0, "weight").double(), draws.normal((4,), 0, "bias").double()
    bias = bias if with_bias else None
    expected = F.conv3d(x, weight, bias, padding=(0, 1, 1))
    assert_close(convolve_pairs(x, weight, pair_kernels(weight), bias), expected, 1e-14)


def test_pairs_round_no_more_than_the_plain_convolution():
    x, weight = draws.normal((1, 64, 6, 8, 8), 0, "x"), draws.normal((64, 64, 3, 3, 3), 0, "weight") / 40
    exact = F.conv3d(x.double(), weight.double(), padding=(0, 1, 1))
    for result in (convolve_pairs(x, weight, pair_kernels(weight), None), F.conv3d(x, weight, padding=(0, 1, 1))):
        assert_close(result.double(), exact, 1e-6)


def test_only_wide_kernels_of_three_frames_in_full_precision_go_in_pairs():
    wide, clip = torch.zeros(FEWEST_CHANNELS, FEWEST_CHANNELS, 3, 3, 3), torch.zeros(1, 1, 1, 1, 1)
    assert pays(clip, wide) and pays(clip.double(), wide.double())
    assert not pays(clip.bfloat16(), wide.bfloat16()), "sums would be rounded once more"
    assert not pays(clip, wide[:, 1:]) and not pays(clip, wide[1:])
    assert not pays(clip, wide[:, :, :1]), "a model that codes every frame by itself"


@pytest.mark.parametrize(("frames", "lengths"), [(1, []), (2, [2]), (3, [2, 1]), (7, [2, 2, 2, 1])])
def test_pieces_are_whole_pairs(frames, lengths, in_pairs, monkeypatch):
    monkeypatch.setattr("megacogvx.models.vae.pieces.PIECE_BYTES", {"cpu": 1})
    layer, x = CausalConv3d(4, 4, 3).double(), draws.normal((1, 4, frames, 3, 3), 0, "x").double()
    expected = layer(x, FrameSpan.whole(frames))
    with torch.no_grad():
        assert_close(layer(x, FrameSpan.whole(frames)), expected, 1e-14)
    assert in_pairs == lengths


@pytest.mark.parametrize("coding", [WHOLE, CHUNKED])
def test_a_model_in_pairs_equals_the_plain_one(coding, in_pairs):
    small = {"block_out_channels": [4, 8, 8], "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 4}
    model = CogVideoXVAE(build_config(VAEConfig, small)).double()
    initialize_weights(model, seed=0)
    video = draws.normal((2, 3, 17, 8, 12), 0, "video").tanh().double()
    latents = draws.normal((2, *model.config.latent_shape(17, 8, 12)), 0, "latents").double()
    expected = model.encode(video, coding), model.decode(latents, coding)
    assert not in_pairs, "with a graph"
    with torch.no_grad():
        assert_close(model.encode(video, coding), expected[0], 1e-12, "moments")
        assert_close(model.decode(latents, coding), expected[1], 1e-12, "pixels")
    assert len(in_pairs) > 20
