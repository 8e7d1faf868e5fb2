import pytest
import torch

from megacogvx import draws
from megacogvx.config import build_config
from megacogvx.errors import ConfigError
from megacogvx.models.vae import CHUNKED, TILED, WHOLE, Coding, CogVideoXVAE, Tile, VAEConfig, initialize_weights
from megacogvx.models.vae.tiling import Cut, by_tiles
from megacogvx.testing.tolerance import assert_close, relative_error

SMALL = {"block_out_channels": [4, 4, 8], "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 2}


def _model():
    model = CogVideoXVAE(build_config(VAEConfig, SMALL))
    initialize_weights(model, seed=0)
    return model.eval().requires_grad_(False)


def _video(frames, height, width):
    return draws.normal((1, 3, frames, height, width), 0, "video").tanh()


@pytest.mark.parametrize("size", [(7, 5), (8, 8), (9, 17), (1, 30)])
def test_tiles_of_what_sees_no_neighbours_are_invisible(size):
    x = draws.normal((2, 3, 4, *size), 0, "x")
    result = by_tiles(lambda tile: 2 * tile, x, Cut(6, 4, 2, 4), Cut(5, 3, 2, 3))
    assert_close(result, 2 * x, 1e-7)


def test_a_tile_fades_into_the_next_linearly():
    values, cut = iter([0.0, 1.0]), Cut(6, 4, 2, 4)
    result = by_tiles(lambda tile: torch.full_like(tile, next(values)), torch.zeros(1, 1, 1, 1, 8), cut, cut)
    assert_close(result.flatten(), torch.tensor([0.0, 0, 0, 0, 0, 0.5, 1, 1]), 1e-7)


def test_frames_of_one_tile_are_coded_whole():
    model, video = _model(), _video(9, 32, 40)
    tile = Tile(32, 40, 0.0, 0.0)
    assert torch.equal(model.encode(video, Coding(tile=tile)), model.encode(video))
    latents = model.encode(video)[:, :2]
    assert torch.equal(model.decode(latents, Coding(tile=tile)), model.decode(latents))


def _still(x, weight, bias, groups, eps, activation=False, group=None, overwrite=False):
    """Stand in for a normalisation; each value by itself, so that what is coded together doesn't matter."""
    return torch.nn.functional.silu(0.3 * x) if activation else 0.3 * x


def test_norms_that_see_tiles_alone_make_the_whole_error_of_tiles_away_from_their_edges():
    """With the norms held still, a place deeper in a tile than the convolutions reach is that of the whole clip."""
    model, video = _model(), _video(5, 32, 192)
    tile = Tile(32, 128, 0.0, 0.25)

    whole, tiled = model.encode(video), model.encode(video, Coding(tile=tile))
    assert 1e-3 < relative_error(tiled, whole) < 0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megacogvx.models.vae.norm.group_norm_moments", _still)
        whole, tiled = model.encode(video), model.encode(video, Coding(tile=tile))
    assert_close(tiled[..., :8], whole[..., :8], 1e-6)
    assert_close(tiled[..., -8:], whole[..., -8:], 1e-6)
    assert relative_error(tiled, whole) > 1e-6


def test_norms_that_see_chunks_alone_make_the_whole_error_of_chunks():
    """With the norms held still, chunks equal the whole clip: the frames between them carry all that is needed."""
    model, video = _model(), _video(25, 16, 24)
    latents = draws.normal((1, 2, 7, 4, 6), 0, "latents")
    for code, x in ((model.encode, video), (model.decode, latents)):
        assert 1e-3 < relative_error(code(x, CHUNKED), code(x)) < 0.5
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("megacogvx.models.vae.norm.group_norm_moments", _still)
            assert_close(code(x, CHUNKED), code(x), 1e-6)


@pytest.mark.parametrize("mode", [CHUNKED, Coding(None, Tile(16, 24, 0.25, 0.0)), Coding(2, Tile(16, 24, 0.25, 0.0))])
def test_constant_video_gives_finite_outputs(mode):
    model = _model()
    for value in (-1.0, 0.0, 1.0):
        moments = model.encode(torch.full((1, 3, 17, 32, 32), value), mode)
        assert torch.isfinite(moments).all()
        assert torch.isfinite(model.decode(moments[:, :2], mode)).all()


@pytest.mark.parametrize(
    ("ratio", "chunk", "decode", "message"),
    [
        (4, 0, False, "latents_per_chunk=0.*work: 1, 2, 3"),
        (4, 1, True, "latents_per_chunk=1.*temporal_compression_ratio=4.*work: 2, 4, 6"),
        (8, 3, True, "latents_per_chunk=3"),
        (1, -1, True, "latents_per_chunk=-1"),
    ],
)
def test_chunks_that_lose_frames_are_config_errors(ratio, chunk, decode, message):
    assert CHUNKED.chunk(ratio, decode) == (2 if decode else 2 * ratio)
    with pytest.raises(ConfigError, match=message):
        Coding(chunk).chunk(ratio, decode)


@pytest.mark.parametrize(
    ("tile", "ratio", "message"),
    [
        (Tile(44, 48, 0, 0), 8, "height 44 .*8 pixels; nearest sizes that work: 40, 48"),
        (Tile(48, 48, 0.25, 0), 8, r"height 48 with an overlap of 0\.2500 .*work: 32, 64"),
        (Tile(), 16, "height 240 .*work: 192, 288"),
        (Tile(8, 16, 0.9, 0), 8, "height 8"),
    ],
)
def test_tiles_that_leave_gaps_are_config_errors(tile, ratio, message):
    for decode in (False, True):
        with pytest.raises(ConfigError, match=message):
            tile.cuts(ratio, decode)


@pytest.mark.parametrize("settings", [(0, 8), (8, -8), (8, 8, 1.0), (8, 8, 0.1, -0.1)])
def test_impossible_tiles_are_config_errors(settings):
    with pytest.raises(ConfigError, match="tile of"):
        Tile(*settings)


def test_the_published_tiles():
    assert TILED.tile.cuts(8, decode=False) == (Cut(240, 200, 5, 25), Cut(360, 288, 9, 36))
    assert TILED.tile.cuts(8, decode=True) == (Cut(30, 25, 40, 200), Cut(45, 36, 72, 288))


def test_modes_by_name():
    assert [Coding.of(mode) for mode in ("whole", "chunked", "tiled")] == [WHOLE, CHUNKED, TILED]
    assert Coding.of("tiled", 4, (48, 80)) == Coding(4, Tile(48, 80))
    assert Coding.of("chunked", 0) == Coding(0), "refused later, not taken for the default"
    for mode, chunk, tile in (("whole", 2, None), ("whole", None, (48, 80)), ("chunked", None, (48, 80))):
        with pytest.raises(ConfigError, match=f"mode is {mode}; use"):
            Coding.of(mode, chunk, tile)
    assert (
        len({str(coding) for coding in (WHOLE, CHUNKED, Coding(4), TILED, Coding(4, Tile()), Coding(None, Tile()))})
        == 6
    )
