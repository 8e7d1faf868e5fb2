import pytest

from megacogvx.config import build_config, dump_config
from megacogvx.errors import ConfigError, DataError
from megacogvx.models.vae.config import PRESETS, VAEConfig


def _preset(name, **settings):
    return build_config(VAEConfig, {"preset": name, **settings})


@pytest.mark.parametrize(
    ("name", "space", "time", "channels"),
    [  # table 1 of the paper
        ("baseline_2d", 8, 1, 4),
        ("variant_a", 8, 4, 8),
        ("variant_b", 8, 4, 16),
        ("variant_c", 8, 4, 32),
        ("variant_d", 8, 8, 32),
        ("variant_e", 16, 8, 128),
        ("cogvideox", 8, 4, 16),
        ("tiny", 8, 4, 16),
    ],
)
def test_presets_compress_as_table_1_says(name, space, time, channels):
    config = _preset(name)
    assert config.spatial_compression_ratio == space
    assert config.latent_shape(16 * time + 1, 64, 96) == (channels, 16 * time // time + 1, 64 // space, 96 // space)


def test_every_preset_is_covered_and_survives_a_round_trip():
    assert set(PRESETS) == {"baseline_2d", *(f"variant_{x}" for x in "abcde"), "cogvideox", "tiny"}
    for name in PRESETS:
        config = _preset(name, layers_per_block=2)
        assert config.layers_per_block == 2, "explicit settings win over the preset"
        assert build_config(VAEConfig, dump_config(config)) == config


@pytest.mark.parametrize(
    ("ratio", "frames", "latent_frames", "decoded"),
    [
        (4, 1, 1, 1), (4, 2, 1, 1), (4, 3, 1, 1), (4, 4, 1, 1), (4, 5, 2, 8), (4, 8, 2, 8), (4, 9, 3, 9),
        (4, 13, 4, 16), (4, 16, 4, 16), (4, 17, 5, 17), (4, 49, 13, 49), (4, 85, 22, 88),
        (8, 17, 3, 17), (8, 33, 5, 33), (2, 5, 3, 5), (1, 6, 6, 6),
    ],
)  # fmt: skip
def test_frame_counts(ratio, frames, latent_frames, decoded):
    config = build_config(VAEConfig, {"temporal_compression_ratio": ratio})
    assert config.latent_frames(frames) == latent_frames
    assert config.decoded_frames(latent_frames) == decoded


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "variant_bb"}, "did you mean variant_b"),
        ({"block_out_channels": [32, 48]}, r"block_out_channels=\(32, 48\).*norm_num_groups=32"),
        ({"block_out_channels": []}, "one width or more"),
        ({"temporal_compression_ratio": 3}, "temporal_compression_ratio=3.*sizes that work: 1, 2, 4, 8"),
        ({"temporal_compression_ratio": 16}, "temporal_compression_ratio=16.*sizes that work: 1, 2, 4, 8"),
        ({"temporal_kernel_size": 2}, "temporal_kernel_size=2 must be 1 or 3"),
        ({"temporal_kernel_size": 1}, "temporal_kernel_size=1.*temporal_compression_ratio=4 must be 1"),
        ({"latent_chanels": 4}, "did you mean latent_channels"),
    ],
)
def test_contradictions_are_config_errors(settings, message):
    with pytest.raises(ConfigError, match=message):
        build_config(VAEConfig, settings)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 4, 9, 64, 64), "4 channels, but vae.in_channels=3"),
        ((3, 9, 64, 64), r"must be \[B, C, T, H, W\]"),
        ((1, 3, 0, 64, 64), "without empty axes"),
        ((1, 3, 9, 60, 67), "60 x 67 pixels.*compressed 8 x 8.*works: 64 x 64"),
        ((1, 3, 9, 3, 100), "works: 8 x 104"),
        ((1, 3, 12, 64, 64), r"12 frames.*8k \+ 1.*nearest that work: 9, 17"),
        ((1, 3, 5, 64, 64), "nearest that work: 1, 9"),
        ((1, 3, 8, 64, 64), "nearest that work: 1, 9"),
    ],
)
def test_clips_that_do_not_fit_are_data_errors(shape, message):
    with pytest.raises(DataError, match=message):
        VAEConfig().check_clip(shape)


@pytest.mark.parametrize(("ratio", "frames"), [(4, 1), (4, 9), (4, 17), (8, 17), (2, 5), (1, 6)])
def test_clips_that_fit(ratio, frames):
    config = build_config(VAEConfig, {"temporal_compression_ratio": ratio})
    config.check_clip((2, 3, frames, 64, 48))
    assert config.decoded_frames(config.latent_frames(frames)) == frames


def test_only_whole_periods_come_back():
    coming = [frames for frames in range(1, 34) if VAEConfig().comes_back(frames)]
    assert coming == [1, 8, 9, 16, 17, 24, 25, 32, 33]
    assert VAEConfig().padded_size(10, 61, 64) == (16, 64, 64)
    assert VAEConfig().padded_size(17, 64, 8) == (17, 64, 8)
    with pytest.raises(DataError, match="2 frames would come back with 1; the nearest that work: 1, 8"):
        VAEConfig().check_comes_back((1, 3, 2, 64, 64))


def test_latents_of_other_channels_are_data_errors():
    VAEConfig().check_latents((1, 16, 3, 5, 7))
    with pytest.raises(DataError, match=r"32 channels, but vae.latent_channels=16"):
        VAEConfig().check_latents((1, 32, 3, 8, 8))
