"""Without a graph layers run some frames at a time and in place: the same numbers, and little memory."""

import pytest
import torch

from megacogvx import draws
from megacogvx.config import build_config
from megacogvx.models.vae import CHUNKED, WHOLE, CogVideoXVAE, VAEConfig, initialize_weights
from megacogvx.models.vae.pieces import over_frames, pieces
from megacogvx.testing.peak_memory import peak_bytes
from megacogvx.testing.tolerance import assert_close

SMALL = {"block_out_channels": [4, 8, 8], "layers_per_block": 2, "norm_num_groups": 2, "latent_channels": 4}


def _model(**settings):
    model = CogVideoXVAE(build_config(VAEConfig, {**SMALL, **settings}))
    initialize_weights(model, seed=0)
    for parameter in model.parameters():
        parameter.data += 0.1 * draws.normal(tuple(parameter.shape), 1, "more")
    return model


@pytest.fixture
def smallest_pieces(monkeypatch):
    """One frame, and one group of channels, at a time."""
    monkeypatch.setattr("megacogvx.models.vae.pieces.PIECE_BYTES", {"cpu": 1})
    monkeypatch.setattr("megacogvx_kernels.group_norm_moments.graphless.PIECE_BYTES", 1)


@pytest.mark.parametrize("coding", [WHOLE, CHUNKED])
@pytest.mark.parametrize(
    "settings",
    [{}, {"block_out_channels": [4, 4, 4]}, {"temporal_compression_ratio": 1, "temporal_kernel_size": 1}],
    ids=["3d", "one width", "2d"],
)
def test_pieces_equal_the_whole_and_leave_the_input_alone(coding, settings, smallest_pieces):
    model, video = _model(**settings), draws.normal((2, 3, 17, 8, 12), 0, "video").tanh()
    latents = draws.normal((2, *model.config.latent_shape(17, 8, 12)), 0, "latents")
    expected = model.encode(video, coding), model.decode(latents, coding)
    before = video.clone(), latents.clone()
    with torch.no_grad():
        assert_close(model.encode(video, coding), expected[0], 1e-6, "moments")
        assert_close(model.decode(latents, coding), expected[1], 1e-6, "pixels")
    assert torch.equal(video, before[0]) and torch.equal(latents, before[1])


def test_a_coder_holds_little_beside_input_and_output_of_one_layer(smallest_pieces, monkeypatch):
    def convolve(x, weight, bias, stride, padding, *_):
        """Return what a convolution returns without its work space, which for layers as small as these is large."""
        axes = zip(x.shape[2:], weight.shape[2:], stride, padding, strict=True)
        return x.new_zeros(len(x), len(weight), *((n + 2 * p - k) // s + 1 for n, k, s, p in axes))

    for name in ("conv2d", "conv3d"):
        monkeypatch.setattr(torch.nn.functional, name, convolve)
    model = _model(block_out_channels=[8, 8, 8], norm_num_groups=8)
    video = draws.normal((1, 3, 17, 32, 32), 0, "video").tanh()
    latents = draws.normal((1, *model.config.latent_shape(17, 32, 32)), 0, "latents")
    widest = 4 * 8 * 17 * 32 * 32  # bytes of 8 channels at full size
    with torch.no_grad():
        encoder, decoder = peak_bytes(lambda: model.encode(video)), peak_bytes(lambda: model.decode(latents))
    # Three frames go into a convolution that makes one; the decoder also spreads latents over the columns, twice.
    assert encoder < (2 + 5 / 17) * widest
    assert decoder < (2 + 5 / 17 + 3 / 4) * widest
    assert peak_bytes(lambda: model.encode(video)) > 6 * widest, "with a graph"


def test_pieces_hold_every_frame_once(monkeypatch):
    x = torch.zeros(1, 2, 7, 4, 4)
    monkeypatch.setattr("megacogvx.models.vae.pieces.PIECE_BYTES", {"cpu": 3 * x[:, :, 0].nbytes})
    assert pieces(x) == [(0, 2), (2, 4), (4, 7)]
    assert pieces(x, 2) == [(2, 4), (4, 7)]
    assert pieces(x, 7) == []
    assert pieces(x, together=2) == [(0, 1), (1, 3), (3, 5), (5, 7)]
    assert pieces(x, 2, together=2) == [(2, 3), (3, 5), (5, 7)]
    assert pieces(x, 7, together=2) == []
    with torch.no_grad():
        assert torch.equal(over_frames(lambda part: part.repeat(1, 2, 1, 1, 2) + 1, x), torch.ones(1, 4, 7, 4, 8))
    monkeypatch.setattr("megacogvx.models.vae.pieces.PIECE_BYTES", {"cpu": 5 * x[:, :, 0].nbytes})
    assert pieces(x, together=2) == [(0, 3), (3, 7)]
