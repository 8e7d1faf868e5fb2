"""Which checkpoint a path names, and what is said when it names none; weights are loaded in tests/parallel."""

import json
import os

import pytest

from megacogvx.checkpoint.directory import CheckpointDirectory
from megacogvx.checkpoint.manifest import files_of, seal
from megacogvx.config import dump_config
from megacogvx.diffusion.config import DiffusionConfig
from megacogvx.errors import CheckpointError, ConfigError
from megacogvx.inference.load import TransformerCheckpoint, VAECheckpoint, find_checkpoint, load_transformer
from megacogvx.models.transformer.config import CogVideoXConfig
from megacogvx.models.vae.config import VAEConfig

ENCODER = {
    "text_kind": "padded", "text_length": 16, "text_width": 64, "latent_channels": 16, "latent_scale_factor": 0.6,
    "vae_fingerprint": "a", "text_encoder_fingerprint": "b",
}  # fmt: skip


def write(run, step, state):
    directory = CheckpointDirectory(run / "checkpoints")
    partial = directory.begin(step)
    (partial / "state.json").write_text(json.dumps(state))
    return directory.commit(step, {name: seal(partial, name) for name in files_of(partial)})


def transformer_state(scaling_factor=None, **model):
    config = {
        "model": dump_config(CogVideoXConfig(preset="tiny", **model)),
        "diffusion": dump_config(DiffusionConfig(snr_shift=3.0, scaling_factor=scaling_factor)),
        "encoder": ENCODER,
    }
    return {"config": config}


def vae_state(**settings):
    return {"config": {"vae": dump_config(VAEConfig(preset="tiny", **settings))}}


def test_a_run_gives_its_newest_complete_checkpoint(tmp_path):
    for step in (20, 100):
        write(tmp_path, step, vae_state())
    (tmp_path / "checkpoints" / "step-00000200.partial").mkdir()
    os.remove(write(tmp_path, 300, vae_state()) / "manifest.json")
    found = VAECheckpoint.find(tmp_path)
    assert (found.step, found.path) == (100, tmp_path / "checkpoints" / "step-00000100")
    assert found.config == VAEConfig(preset="tiny")


def test_a_checkpoint_may_be_named(tmp_path):
    for step in (20, 100):
        write(tmp_path, step, vae_state())
    assert find_checkpoint(tmp_path / "checkpoints" / "step-00000020").step == 20


def test_a_half_written_checkpoint_is_refused(tmp_path):
    write(tmp_path, 20, vae_state())
    half = write(tmp_path, 100, vae_state())
    (half / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="was not written to its end; complete checkpoints beside it: 20"):
        find_checkpoint(half)


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither a run folder .* nor a checkpoint"):
        find_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"neither a diffusers folder .*, nor SAT's .*, nor a run of ours"):
        TransformerCheckpoint.find(tmp_path)
    with pytest.raises(CheckpointError, match="neither a run folder"):
        find_checkpoint(tmp_path / "checkpoints" / "step-00000005")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        find_checkpoint(tmp_path)
    write(tmp_path, 5, {"something": 1})
    with pytest.raises(CheckpointError, match="doesn't say which config"):
        find_checkpoint(tmp_path)


def test_a_checkpoint_of_another_kind_or_version_is_refused(tmp_path):
    write(tmp_path, 5, vae_state())
    with pytest.raises(CheckpointError, match=r"holds a vae and no transformer; name one that does"):
        TransformerCheckpoint.find(tmp_path)
    write(tmp_path, 6, {"config": {"vae": {"new_setting": 1}}})
    with pytest.raises(CheckpointError, match=r"unknown key new_setting.*written by another version"):
        VAECheckpoint.find(tmp_path)


@pytest.mark.parametrize(("own", "expected"), [(None, 0.6), (0.9, 0.9)])
def test_what_sampling_has_to_know(tmp_path, own, expected):
    write(tmp_path, 5, transformer_state(own))
    found = TransformerCheckpoint.find(tmp_path)
    assert found.model == CogVideoXConfig(preset="tiny")
    assert found.settings.diffusion.snr_shift == 3.0
    assert found.settings.encoder.text_kind == "padded"
    assert found.settings.scaling_factor == expected


def test_an_average_that_was_not_kept_is_refused(tmp_path):
    write(tmp_path, 5, transformer_state())
    with pytest.raises(ConfigError, match=r"step-00000005 keeps no averaged weights \(ema\.decay was 0\)"):
        load_transformer(tmp_path, None, None, "ema")


def test_vae_and_transformer_have_to_fit(tmp_path):
    write(tmp_path / "a", 5, transformer_state())
    write(tmp_path / "b", 5, vae_state())
    write(tmp_path / "c", 5, vae_state(latent_channels=4))
    write(tmp_path / "d", 5, transformer_state(in_channels=32))
    write(tmp_path / "e", 5, transformer_state(in_channels=24))
    transformer, vae = TransformerCheckpoint.find(tmp_path / "a"), VAECheckpoint.find(tmp_path / "b")
    transformer.check_vae(vae)
    with pytest.raises(ConfigError, match=r"latent_channels=4, .* model.out_channels=16"):
        transformer.check_vae(VAECheckpoint.find(tmp_path / "c"))
    with_image = TransformerCheckpoint.find(tmp_path / "d")
    with_image.check_vae(vae)
    assert (transformer.settings.expects_image, with_image.settings.expects_image) == (False, True)
    with pytest.raises(ConfigError, match=r"model.in_channels=24 .* or twice as many for image to video"):
        TransformerCheckpoint.find(tmp_path / "e").check_vae(vae)
