"""Packs that a transformer isn't made for: the message names the sample, the values, the setting and a way out."""

from __future__ import annotations

import pytest
import torch

from megacogvx.errors import DataError
from megacogvx.models.transformer import CogVideoXConfig
from megacogvx.models.transformer.checks import check_pack, check_rows, rope_grid_problem
from megacogvx.pack_layout import PADDING_ID, PackLayout, PackSample, build_layout, place_sample
from megacogvx.patches import grid_of

CONFIG = CogVideoXConfig(preset="tiny", in_channels=4, max_text_seq_length=5, sample_height=8, sample_width=12)


def pack(*sizes, config=CONFIG):
    return build_layout(
        [place_sample(place + 40, *size, config.patch) for place, size in enumerate(sizes)], config.patch
    )


def test_what_fits_passes():
    check_pack(CONFIG, pack((1, 8, 12, 5), (30, 2, 4, 0)))
    check_rows(CONFIG, torch.zeros(3, 16), torch.zeros(2, 64))


def test_an_empty_pack():
    empty = PackLayout((PackSample(PADDING_ID, 64, (0, 0, 0)),), CONFIG.patch)
    with pytest.raises(DataError, match="a pack of 64 tokens holds no sample; leave it out"):
        check_pack(CONFIG, empty)
    with pytest.raises(DataError, match="at least one sample"):
        build_layout([], CONFIG.patch)


def test_a_text_longer_than_the_models():
    with pytest.raises(DataError, match=r"sample 41 has 6 text tokens.*max_text_seq_length=5; .*setting to 6"):
        check_pack(CONFIG, pack((1, 8, 12, 5), (1, 8, 12, 6)))


@pytest.mark.parametrize(("height", "width", "wanted"), [(10, 12, (10, 12)), (8, 14, (8, 14)), (2, 20, (8, 20))])
def test_more_tokens_than_the_rope_grid(height, width, wanted):
    with pytest.raises(DataError) as error:
        check_pack(CONFIG, pack((1, height, width, 1)))
    message = str(error.value)
    assert f"sample 40: {height // 2} x {width // 2} tokens (h, w) are more than the rope grid's 4 x 6" in message
    assert "model.sample_height=8, model.sample_width=12" in message
    assert f"sample_height to at least {wanted[0]} and model.sample_width to at least {wanted[1]}" in message
    larger = CONFIG.model_copy(update={"sample_height": wanted[0], "sample_width": wanted[1]})
    check_pack(larger, pack((1, height, width, 1)))  # what the message promises


def test_portrait_clips_fit_where_the_native_size_may_be_turned():
    """8 x 12 cells natively: 12 x 8 and what is smaller fit with `portrait`, what is large on both sides doesn't."""
    portrait = CONFIG.model_copy(update={"portrait": True})
    for height, width in ((12, 8), (10, 6), (8, 12), (2, 12)):
        check_pack(portrait, pack((1, height, width, 1)))
    for height, width in ((10, 10), (14, 8), (12, 10)):
        with pytest.raises(DataError, match="more than the rope grid's 4 x 6"):
            check_pack(portrait, pack((1, height, width, 1)))
    with pytest.raises(DataError, match=r"set model\.portrait=true if it is trained on portrait clips too, or model"):
        check_pack(CONFIG, pack((1, 12, 8, 1)))
    with pytest.raises(ValueError, match="learned table has rows for the native size alone"):
        CogVideoXConfig(preset="tiny", portrait=True, use_learned_positional_embeddings=True)


def test_the_released_1_5_reads_300_cells_and_no_more():
    config = CogVideoXConfig(preset="cogvideox1_5_5b")
    assert not rope_grid_problem(config, place_sample(0, 2, 300, 300, 226, config.patch))
    assert "150 x 150" in rope_grid_problem(config, place_sample(0, 2, 302, 300, 226, config.patch))


@pytest.mark.parametrize(
    ("size", "found", "way_out"),
    [
        ((1, 8, 10, 1), r"\(1, 4, 5\)", "resize the video to 8 x 12 latent cells"),
        ((1, 6, 12, 1), r"\(1, 3, 6\)", "resize the video to 8 x 12 latent cells"),
        ((4, 8, 12, 1), r"\(4, 4, 6\)", r"at most 3 latent frames, or raise model\.sample_frames=9"),
    ],
)
def test_a_sample_that_the_learned_table_is_not_made_for(size, found, way_out):
    """Said of the whole pack on every rank: the table itself is read by the ranks that hold the sample alone."""
    config = CONFIG.model_copy(update={"use_learned_positional_embeddings": True, "sample_frames": 9})
    check_pack(config, pack((3, 8, 12, 5), (1, 8, 12, 0)))
    with pytest.raises(DataError, match=rf"sample 41: {found} tokens .* at most 3 x 4 x 6; .*{way_out}.*, or use"):
        check_pack(config, pack((1, 8, 12, 1), size))


@pytest.mark.parametrize("changes", [{"rope_grid": "crop"}, {"use_rotary_positional_embeddings": False}])
def test_other_positions_have_no_limit(changes):
    check_pack(CONFIG.model_copy(update=changes), pack((1, 40, 40, 1)))


def test_channels_that_do_not_fit():
    with pytest.raises(
        DataError, match=r"rows of 32 values are patches of 1 x 2 x 2 .* with 8 channels.*in_channels=4 .*16"
    ):
        check_rows(CONFIG, torch.zeros(3, 32), torch.zeros(2, 64))
    with pytest.raises(DataError, match=r"rows of 18 values .* no whole number of channels"):
        check_rows(CONFIG, torch.zeros(3, 18), torch.zeros(2, 64))
    with pytest.raises(DataError, match=r"width 32, but model\.text_embed_dim=64"):
        check_rows(CONFIG, torch.zeros(3, 16), torch.zeros(2, 32))


@pytest.mark.parametrize(("height", "width", "near"), [(7, 12, "6 x 12"), (8, 11, "8 x 10"), (1, 12, "2 x 12")])
def test_height_and_width_that_do_not_fit_the_patch(height, width, near):
    with pytest.raises(DataError, match=rf"3 x {height} x {width} \(T, H, W\).*patch \(1, 2, 2\).*3 x {near}$"):
        grid_of(3, height, width, CONFIG.patch)
