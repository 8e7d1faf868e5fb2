import pytest
import torch

from megacogvx import draws
from megacogvx.config import build_config
from megacogvx.errors import ConfigError, DataError
from megacogvx.models.vae import (
    CHUNKED,
    Coding,
    CogVideoXVAE,
    VAEConfig,
    VAELoss,
    VAELossConfig,
    gaussian,
    initialize_weights,
)
from megacogvx.testing.tolerance import assert_close

SMALL = {"block_out_channels": [4, 4, 8], "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 2}


def _model(**settings):
    model = CogVideoXVAE(build_config(VAEConfig, {**SMALL, **settings}))
    initialize_weights(model, seed=0)
    return model


def _video(frames, size=16):
    return draws.normal((1, 3, frames, size, size), 0, "video").tanh()


@pytest.mark.parametrize("frames", [1, 9, 17])
def test_a_training_clip_comes_back_in_its_own_shape(frames):
    model, video = _model(), _video(frames)
    noise = draws.normal((1, *model.config.latent_shape(frames, 16, 16)), 0, "noise")
    reconstruction = model(video, noise)
    assert reconstruction.video_BCTHW.shape == video.shape
    latents = gaussian.sample(reconstruction.moments_B2CTHW, noise)
    assert torch.equal(reconstruction.video_BCTHW, model.decode(latents))
    assert torch.equal(model(video).video_BCTHW, model.decode(gaussian.mode(reconstruction.moments_B2CTHW)))


def test_only_8k_plus_1_frames_are_trained_on_but_others_are_coded():
    model = _model()
    with pytest.raises(DataError, match="6 frames"):
        model(_video(6))
    assert model.encode(_video(6)).shape == (1, 4, 2, 4, 4)


def test_wrong_shapes_are_data_errors():
    model = _model()
    with pytest.raises(DataError, match=r"vae\.in_channels=3"):
        model.encode(torch.zeros(1, 1, 1, 16, 16))
    with pytest.raises(DataError, match="works: 20 x 16"):
        model.encode(torch.zeros(1, 3, 1, 18, 17))
    with pytest.raises(DataError, match=r"vae\.latent_channels=2"):
        model.decode(torch.zeros(1, 4, 1, 4, 4))


def test_chunks_that_lose_frames_are_config_errors():
    model = _model()
    with pytest.raises(ConfigError, match="latents_per_chunk=0"):
        model.encode(_video(17), Coding(0))
    with pytest.raises(ConfigError, match="latents_per_chunk=1"):
        model.decode(torch.zeros(1, 2, 5, 4, 4), Coding(1))


def test_a_clip_of_one_chunk_is_the_whole_clip():
    model, video = _model(), _video(9)
    moments = model.encode(video)
    assert torch.equal(model.encode(video, CHUNKED), moments)


def test_chunks_by_hand_equal_chunks_at_once_and_leave_nothing_in_the_model():
    model, video = _model(), _video(25)
    with torch.no_grad():
        expected = model.encode(video, CHUNKED)
        parts, halos = [], []
        for start, stop in ((0, 9), (9, 17), (17, 25)):
            model.encode(_video(9))  # another clip in between
            part, halos = model.encode_chunk(video[:, :, start:stop], halos)
            parts.append(part)
        assert torch.equal(torch.cat(parts, dim=2), expected)
        latents = gaussian.mode(expected)
        first, halos = model.decode_chunk(latents[:, :, :3], [])
        second, halos = model.decode_chunk(latents[:, :, 3:5], halos)
        third, _ = model.decode_chunk(latents[:, :, 5:], halos)
        whole = model.decode(latents, CHUNKED)
        assert torch.equal(torch.cat([first, second, third], dim=2), whole)
    assert whole.shape == video.shape


def test_the_past_never_sees_the_future_but_through_norm_statistics():
    """With the norms held still, frames before a change keep their latents."""
    model, video = _model(), _video(17)
    changed = video.clone()
    changed[:, :, 9:] = -changed[:, :, 9:]

    def still(x, weight, bias, groups, eps, activation=False, group=None, overwrite=False):
        return torch.nn.functional.silu(0.3 * x) if activation else 0.3 * x

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("megacogvx.models.vae.norm.group_norm_moments", still)
        a, b = model.encode(video), model.encode(changed)
        assert torch.equal(a[:, :, :3], b[:, :, :3])
        assert not torch.equal(a[:, :, 3], b[:, :, 3])
        pixels_a, pixels_b = model.decode(gaussian.mode(a)), model.decode(gaussian.mode(b))
        assert torch.equal(pixels_a[:, :, :9], pixels_b[:, :, :9])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_data_errors(bad):
    model, video = _model(), _video(9)
    video[0, 1, 4, 3, 2] = bad
    with pytest.raises(DataError, match=r"1 of 6912 values of the video \[1, 3, 9, 16, 16\] are NaN or infinite"):
        model.encode(video, CHUNKED)
    with pytest.raises(DataError, match="of the video"):
        model(video)
    latents = torch.zeros(1, 2, 3, 2, 2)
    latents[0, :, 1, 1, 0] = bad
    with pytest.raises(DataError, match="2 of 24 values of the latents"):
        model.decode(latents)


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_constant_video_gives_finite_outputs_and_gradients(value):
    model = _model()
    video = torch.full((1, 3, 9, 16, 16), value)
    losses = VAELoss(VAELossConfig())(video, *model(video))
    losses.total.backward()
    assert torch.isfinite(losses.total)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_a_2d_model_codes_every_frame_by_itself():
    model = _model(temporal_compression_ratio=1, temporal_kernel_size=1)
    video = _video(5)
    with torch.no_grad():
        moments = model.encode(video)
        for t in range(5):
            assert_close(moments[:, :, t : t + 1], model.encode(video[:, :, t : t + 1]), 1e-6)
        assert_close(model.encode(video, CHUNKED), moments, 1e-6)
        assert model(video).video_BCTHW.shape == video.shape


@pytest.mark.parametrize("preset", ["baseline_2d", "variant_a", "variant_b", "variant_c", "variant_d", "variant_e"])
def test_every_variant_of_table_1_codes_and_trains(preset):
    """In narrow: the widths are no part of the variants."""
    stages = len(build_config(VAEConfig, {"preset": preset}).block_out_channels)
    narrow = {"block_out_channels": [2] * stages, "layers_per_block": 1, "norm_num_groups": 1}
    model = CogVideoXVAE(build_config(VAEConfig, {"preset": preset, **narrow}))
    initialize_weights(model, seed=0)
    config = model.config
    video = _video(17, 2 * config.spatial_compression_ratio)
    channels, frames, height, width = config.latent_shape(17, *video.shape[3:])
    result = model(video)
    assert result.moments_B2CTHW.shape == (1, 2 * channels, frames, height, width)
    assert (height, width) == (2, 2) and frames == 16 // config.temporal_compression_ratio + 1
    assert result.video_BCTHW.shape == video.shape
    loss = VAELoss(VAELossConfig())
    _check_that_a_step_goes_downhill(model, loss, video, loss(video, *result).total, size=1e-3)  # narrow: steep
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    assert float(model.encoder.conv_in.weight.grad.abs().max()) > 0


def test_bfloat16_runs_and_stays_close():
    model, video = _model(), _video(9)
    with torch.no_grad():
        expected = model.encode(video)
        moments = model.bfloat16().encode(video.bfloat16())
    assert moments.dtype == torch.bfloat16
    assert_close(moments.float(), expected, 0.1)


def test_a_training_step_goes_downhill():
    model, loss, video = _model(), VAELoss(VAELossConfig()), _video(9)
    _check_that_a_step_goes_downhill(model, loss, video, loss(video, *model(video)).total, size=1e-2)


def _check_that_a_step_goes_downhill(model, loss, video, before, size):
    before.backward()
    with torch.no_grad():
        norm = torch.sqrt(sum(parameter.grad.square().sum() for parameter in model.parameters()))
        for parameter in model.parameters():
            parameter -= size * parameter.grad / norm
        after = loss(video, *model(video)).total
    assert before - after > 0.5 * size * norm, "the gradient foretells a step's gain to first order"
