"""What a run may start from."""

import json

import pytest

from megacogvx.checkpoint.directory import CheckpointDirectory, files_of, seal
from megacogvx.config import build_config, dump_config
from megacogvx.errors import CheckpointError
from megacogvx.models.vae.config import VAEConfig
from megacogvx.training.config import VAETrainConfig
from megacogvx.training.setup import _open_run


def _run_of(folder, **vae):
    directory = CheckpointDirectory(folder / "checkpoints")
    partial = directory.begin(5)
    state = {"config": {"vae": dump_config(VAEConfig(preset="tiny", **vae))}}
    (partial / "state.json").write_text(json.dumps(state))
    directory.commit(5, {name: seal(partial, name) for name in files_of(partial)})
    return folder


def _open(tmp_path, start):
    sections = {
        "vae": {"preset": "tiny"},
        "training": {"steps": 1, "run_folder": str(tmp_path / "second"), "start_from": str(start)},
    }
    config = build_config(VAETrainConfig, sections)
    return _open_run(config, config.training, "vae")


def test_another_variant_of_the_vae_is_no_start(tmp_path):
    start = _run_of(tmp_path / "first", latent_channels=8)
    with pytest.raises(
        CheckpointError, match=r"step-00000005 holds another variant .*latent_channels: 8 there, 16 here; set"
    ):
        _open(tmp_path, start)


def test_the_same_variant_with_another_scale_is_a_start(tmp_path):
    _, resolved = _open(tmp_path, _run_of(tmp_path / "first", scaling_factor=0.5))
    assert resolved["vae"]["scaling_factor"] == 1.0
