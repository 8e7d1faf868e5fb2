from itertools import pairwise
from pathlib import Path

import pytest
import torch

from megacogvx.checkpoint.directory import CheckpointDirectory
from megacogvx.checkpoint.distributed import save
from megacogvx.config import dump_config, load_config
from megacogvx.errors import CheckpointError
from megacogvx.models.transformer import CogVideoXConfig, CogVideoXTransformer, initialize_weights, transformer_core
from megacogvx.pack_layout import build_layout, place_sample
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.groups import initialize, shutdown
from megacogvx.patches import patchify, unpatchify
from megacogvx.testing.tolerance import assert_close
from megacogvx.training.config import TrainConfig
from megacogvx.training.start_from import find_start, resize_positions, start_from, unfit

SMALL = {
    "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "text_embed_dim": 8, "time_embed_dim": 16,
    "in_channels": 4, "out_channels": 4, "use_rotary_positional_embeddings": True,
}  # fmt: skip
FRAMES, HEIGHT, WIDTH, TEXT = 4, 4, 6, 3


@pytest.fixture(scope="module")
def groups():
    yield initialize(ParallelConfig(device="cpu"))
    shutdown()


def _model(groups, seed, **settings):
    config = CogVideoXConfig(**{**SMALL, **settings})
    model = CogVideoXTransformer(config, transformer_core(config, ParallelConfig(), groups, torch.float32), groups)
    initialize_weights(model, seed)
    with torch.no_grad():  # blocks that do something, and biases that count
        for parameter in model.parameters():
            parameter.add_(torch.linspace(-0.1, 0.1, parameter.numel()).reshape(parameter.shape))
    return model


@pytest.fixture
def earlier(groups, tmp_path):
    """Return a model and the run folder that holds its checkpoint."""
    model = _model(groups, 1)
    directory = CheckpointDirectory(tmp_path / "checkpoints")
    save(directory, 3, model, None, {"state": {}, "config": {"model": dump_config(model.config)}}, groups)
    return model, tmp_path


def _started(groups, folder, **settings):
    model = _model(groups, 2, **settings)
    start_from(model, find_start(folder, model.config), ParallelConfig(), groups)
    return model


def _predict(model, latents_TCHW):
    """Return the model's velocity for one video, as latents."""
    patch = model.config.patch
    layout = build_layout([place_sample(0, len(latents_TCHW), HEIGHT, WIDTH, TEXT, patch)], patch)
    text = torch.linspace(-1, 1, TEXT * 8).reshape(TEXT, 8)
    rows = model(patchify(latents_TCHW, patch), text, torch.tensor([500, 0]), layout)
    return unpatchify(rows, layout.samples[0].grid, patch)


def _latents(frames, channels):
    return torch.linspace(-1, 1, frames * channels * HEIGHT * WIDTH).sin().reshape(frames, channels, HEIGHT, WIDTH)


def test_the_same_model_starts_with_the_same_weights(groups, earlier):
    model, folder = earlier
    started = _started(groups, folder, sample_height=32)
    assert all(torch.equal(new, old) for new, old in zip(started.parameters(), model.parameters(), strict=True))


def test_new_input_channels_change_nothing_at_first(groups, earlier):
    model, folder = earlier
    noisy, image = _latents(FRAMES, 4), _latents(FRAMES, 4) * 3
    out = _predict(_started(groups, folder, in_channels=8), torch.cat([noisy, image], dim=1))
    assert_close(out, _predict(model, noisy), 1e-6, "with an image's channels")


def test_a_temporal_patch_sees_the_mean_of_its_frames_and_answers_all_of_them(groups, earlier):
    model, folder = earlier
    noisy = _latents(2 * FRAMES, 4)
    out = _predict(_started(groups, folder, patch_size_t=2), noisy)
    expected = _predict(model, (noisy[0::2] + noisy[1::2]) / 2).repeat_interleave(2, dim=0)
    assert_close(out, expected, 1e-6, "two frames a token")


def test_a_new_motion_offset_and_a_new_table_change_nothing_at_first(groups, earlier):
    model, folder = earlier
    native = {"sample_frames": 4 * FRAMES - 3, "sample_height": HEIGHT, "sample_width": WIDTH}
    started = _started(groups, folder, ofs_embed_dim=16, use_learned_positional_embeddings=True, **native)
    assert_close(_predict(started, _latents(FRAMES, 4)), _predict(model, _latents(FRAMES, 4)), 1e-6, "with an offset")


def test_a_learned_table_is_resized_over_its_grid():
    table = {"use_learned_positional_embeddings": True, "max_text_seq_length": 2}
    before = CogVideoXConfig(**SMALL, **table, sample_frames=9, sample_height=4, sample_width=4)
    after = CogVideoXConfig(**SMALL, **table, sample_frames=9, sample_height=8, sample_width=4)
    t, h, w = before.native_grid
    ramp = torch.arange(h, dtype=torch.float32).reshape(1, h, 1, 1).expand(t, h, w, 32).reshape(-1, 32)
    text = torch.full((2, 32), 7.0)
    resized = resize_positions(torch.cat([text, ramp]), before, after)
    assert torch.equal(resized[:2], text)
    rows = resized[2:].reshape(*after.native_grid, 32)[0, :, 0, 0]
    assert_close(rows, torch.linspace(0, h - 1, 4), 1e-6, "a ramp stays a ramp")


def test_another_kind_of_model_is_named(groups, earlier):
    _, folder = earlier
    with pytest.raises(CheckpointError, match=r"model\.num_layers: 1 there, 2 here"):
        find_start(folder, CogVideoXConfig(**{**SMALL, "num_layers": 2}))
    with pytest.raises(CheckpointError, match=r"model\.in_channels=2 must be at least 4"):
        find_start(folder, CogVideoXConfig(**{**SMALL, "in_channels": 2}))
    with pytest.raises(CheckpointError, match="neither a run folder"):
        find_start(Path("nowhere"), CogVideoXConfig(**SMALL))


@pytest.mark.parametrize("name", ["cogvideox_2b", "cogvideox_5b", "progressive_tiny"])
def test_each_stage_of_the_examples_grows_to_the_next(name):
    configs = Path(__file__).resolve().parents[3] / "examples" / "configs"
    stages = [load_config(TrainConfig, configs / f"{name}_stage{stage}.yaml") for stage in (1, 2, 3, 4)]
    for before, after in pairwise(stages):
        assert unfit(before.model, after.model) == []
        assert after.training.start_from == before.training.run_folder


@pytest.mark.parametrize(("last", "image"), [("cogvideox_5b_stage4", "cogvideox_5b_i2v"),
                                              ("progressive_tiny_stage4", "progressive_tiny_i2v")])  # fmt: skip
def test_image_to_video_grows_out_of_the_last_stage(last, image):
    configs = Path(__file__).resolve().parents[3] / "examples" / "configs"
    before, after = (load_config(TrainConfig, configs / f"{name}.yaml") for name in (last, image))
    assert unfit(before.model, after.model) == [] and after.is_image_to_video and not before.is_image_to_video
    assert after.training.start_from == before.training.run_folder and after.image.vae is not None
