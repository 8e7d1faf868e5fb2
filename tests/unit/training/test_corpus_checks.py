"""What a training asks of its dataset, said with names before any process group exists."""

import pytest
import torch

from megacogvx.config import build_config
from megacogvx.data.corpus import Corpus
from megacogvx.errors import CheckpointError, ConfigError
from megacogvx.testing import tiny_dataset
from megacogvx.testing.tiny_conditions import MODEL, TEXT_LENGTH, TEXT_WIDTH, write_vae
from megacogvx.testing.tiny_dataset import tiny_encoder, write_tiny_dataset
from megacogvx.training.config import TrainConfig
from megacogvx.training.corpus_checks import check_corpus
from megacogvx.training.held_out import plan_held_out


def check(folder, model=None, sizes=((1, 4, 4), (3, 4, 6)), kind="padded", first_frame=False, **sections):
    encoder = tiny_encoder(kind, text_length=TEXT_LENGTH, text_width=TEXT_WIDTH, first_frame=first_frame)
    write_tiny_dataset(folder / "data", 6, encoder=encoder, sizes=sizes)
    values = {"model": {**MODEL, "in_channels": 4, **(model or {})}, **sections}
    config = build_config(TrainConfig, {**values, "data": {"paths": [str(folder / "data")], "tokens_per_pack": 64}})
    config.validate_layout(1)
    check_corpus(config, Corpus(config.data))


def test_text_to_video_asks_for_no_frozen_encoder(tmp_path):
    check(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": {"in_channels": 8}}, r"in_channels=8 is image to video.*set image\.vae"),
        ({"model": {"in_channels": 6}}, r"model\.in_channels=6 must be model\.out_channels=4 .* or 8"),
        ({"image": {"vae": "x"}}, r"image\.vae=x, but model\.in_channels=4 has no channels for an image"),
        ({"kind": "token_ids"}, r"holds token ids.*set text\.encoder"),
        ({"diffusion": {"dropped_text": "empty"}}, r"dropped_text=empty needs .* set text\.encoder"),
        (
            {"diffusion": {"dropped_text": "empty"}, "text": {"encoder": "t5"}, "kind": "real"},
            r"dropped_text=empty with a dataset of encoder\.text_kind=real",
        ),
    ],
)
def test_what_is_missing_is_named(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        check(tmp_path, **options)


def test_a_dataset_without_first_frames_is_named(tmp_path):
    options = {"model": {"in_channels": 8}, "image": {"vae": str(write_vae(tmp_path))}}
    with pytest.raises(ConfigError, match=r"data lacks the first frame of 6 of 6 samples \(the first is 1000\)"):
        check(tmp_path, **options)
    check(tmp_path / "with", first_frame=True, **options)


def test_a_first_frame_of_another_size_than_its_video_is_named(tmp_path, monkeypatch):
    options = {"model": {"in_channels": 8}, "image": {"vae": str(write_vae(tmp_path))}, "first_frame": True}
    monkeypatch.setattr(tiny_dataset, "tiny_image", lambda sample_id, _: torch.zeros(16, 24, 3, dtype=torch.uint8))
    with pytest.raises(ConfigError, match=r"of 6 of 6 samples .* sample 1000 is 16 x 24 pixels .* stand for 32 x 32;"):
        check(tmp_path, **options)


def test_every_size_is_held_to_the_rope_grid_not_the_largest_of_each_side(tmp_path):
    """Landscape and portrait clips: each fits the native size or its transpose, their largest sides together don't."""
    sizes = ((1, 4, 6), (1, 6, 4))
    with pytest.raises(ConfigError, match=r"videos of 1 x 6 x 4 latent cells.*model\.portrait=true"):
        check(tmp_path, sizes=sizes)
    check(tmp_path / "both", {"portrait": True}, sizes=sizes)
    with pytest.raises(ConfigError, match="videos of 1 x 6 x 6 latent cells"):
        check(tmp_path / "square", {"portrait": True}, sizes=(*sizes, (1, 6, 6)))


def test_videos_that_the_learned_table_is_not_made_for_are_named(tmp_path):
    """Of another height or width than its own, or longer; shorter ones take its front."""
    learned = {"use_learned_positional_embeddings": True, "sample_frames": 9}
    check(tmp_path / "fits", learned, sizes=((1, 4, 6), (3, 4, 6)))
    with pytest.raises(ConfigError, match=r"of 1 x 4 x 4 latent .* \(1, 2, 2\) tokens .* most 3 x 2 x 3; resize"):
        check(tmp_path / "narrow", learned, sizes=((3, 4, 6), (1, 4, 4)))
    with pytest.raises(ConfigError, match=r"videos of 4 x 4 x 6 latent .* at most 3 x 2 x 3"):
        check(tmp_path / "long", learned, sizes=((3, 4, 6), (4, 4, 6)))


def test_videos_that_do_not_divide_into_patches_are_named(tmp_path):
    larger = {"patch_size": 4, "sample_height": 16, "sample_width": 16}
    with pytest.raises(ConfigError, match=r"1 x 4 x 6 latent .* model\.patch_size=4 must .*: 1, 2; or filter"):
        check(tmp_path, larger, sizes=((3, 4, 4), (1, 4, 6)))
    check(tmp_path / "fits", larger, sizes=((3, 4, 4), (1, 12, 16)))


def test_the_decoder_of_validation_videos_is_looked_at_before_the_start(tmp_path):
    """Only the first rank would miss it, at its first validation, while the others wait."""
    encoder = tiny_encoder("padded", text_length=TEXT_LENGTH, text_width=TEXT_WIDTH)
    write_tiny_dataset(tmp_path / "data", 6, encoder=encoder, sizes=((1, 4, 4),))
    data = {"paths": [str(tmp_path / "data")], "tokens_per_pack": 64}

    def plan(vae):
        videos = {"paths": data["paths"], "videos": 1, "vae": str(vae)}
        values = {"model": {**MODEL, "in_channels": 4}, "data": data, "validation": videos}
        return plan_held_out(build_config(TrainConfig, values))

    assert plan(write_vae(tmp_path)) is not None
    with pytest.raises(CheckpointError, match="nowhere"):
        plan(tmp_path / "nowhere")
