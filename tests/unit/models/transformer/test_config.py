import pytest

from megacogvx.config import Section, build_config, dump_config
from megacogvx.errors import ConfigError
from megacogvx.models.transformer.config import PRESETS, CogVideoXConfig


class Root(Section):
    model: CogVideoXConfig = CogVideoXConfig()


def _build(**values):
    return build_config(Root, {"model": values}).model


def test_sizes_follow_from_the_settings():
    config = CogVideoXConfig(preset="cogvideox1_5_5b_i2v")
    assert (config.hidden_size, config.ffn_hidden_size) == (3072, 12288)
    assert config.patch == (2, 2, 2)
    assert (config.row_size_in, config.row_size_out) == (32 * 8, 16 * 8)
    assert config.rope_axes == (16, 24, 24)
    assert CogVideoXConfig(preset="cogvideox_5b").native_grid == (13, 30, 45)


def test_explicit_settings_win_over_the_preset():
    config = _build(preset="cogvideox_5b", num_layers=3)
    assert (config.num_layers, config.num_attention_heads) == (3, 48)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_resolved_preset_reads_back_as_itself(preset):
    config = _build(preset=preset)
    assert _build(**dump_config(config)) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preset": "cogvideox_5"}, "did you mean cogvideox_5b"),
        ({"num_layer": 3}, "model.num_layers"),
        ({"use_learned_positional_embeddings": True}, "use_rotary_positional_embeddings=true"),
        ({"use_rotary_positional_embeddings": True, "attention_head_dim": 24}, "multiple of 16"),
        ({"num_attention_heads": 3, "attention_head_dim": 8}, "multiple of 16"),
        ({"ofs_embed_dim": 256}, "time_embed_dim=512"),
        ({"patch_size": 0}, "model.patch_size=0"),
        ({"rope_grid": "linspace"}, "slice"),
    ],
)
def test_a_wrong_setting_says_what_would_be_right(values, message):
    with pytest.raises(ConfigError, match=message):
        _build(**values)
