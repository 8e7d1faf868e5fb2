"""What a run may start from, and whether a config may go on with what its run folder holds."""

import json
from types import SimpleNamespace

import pytest
import torch

from megacogvx.checkpoint.directory import CheckpointDirectory
from megacogvx.checkpoint.manifest import files_of, seal
from megacogvx.config import build_config, dump_config
from megacogvx.errors import AgreedError, CheckpointError
from megacogvx.models.vae.config import VAEConfig
from megacogvx.training import agreement, resume
from megacogvx.training.config import TrainConfig
from megacogvx.training.resume import load_newest_or_start, open_metrics, open_run
from megacogvx.training.state import TrainState
from megacogvx.training.vae_config import VAETrainConfig


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
        "clips": {"paths": ["none"]},
        "training": {"steps": 1, "run_folder": str(tmp_path / "second"), "start_from": str(start)},
    }
    config = build_config(VAETrainConfig, sections)
    return open_run(config, config.training, "vae")


def test_another_variant_of_the_vae_is_no_start(tmp_path):
    start = _run_of(tmp_path / "first", latent_channels=8)
    with pytest.raises(
        CheckpointError, match=r"step-00000005 holds another variant .*latent_channels: 8 there, 16 here; set"
    ):
        _open(tmp_path, start)


def test_the_same_variant_with_another_scale_is_a_start(tmp_path):
    _, resolved = _open(tmp_path, _run_of(tmp_path / "first", scaling_factor=0.5))
    assert resolved["vae"]["scaling_factor"] == 1.0


def run(folder, stored, sections=None, **changes):
    """Open a run of a tiny model in `folder`, whose checkpoint says that its section `model` was `stored`."""
    directory = CheckpointDirectory(folder / "checkpoints")
    partial = directory.begin(5)
    (partial / "state.json").write_text(json.dumps({"config": {"model": stored, **(sections or {})}}))
    directory.commit(5, {name: seal(partial, name) for name in files_of(partial)})
    values = {"model": {"preset": "tiny"}, "data": {"paths": ["x"], "tokens_per_pack": 64}, **changes}
    config = build_config(TrainConfig, {**values, "training": {"run_folder": str(folder)}})
    return open_run(config, config.training, section="model")


def model(**changes):
    values = {"preset": "tiny", **changes}
    config = build_config(TrainConfig, {"model": values, "data": {"paths": ["x"], "tokens_per_pack": 64}})
    return dump_config(config.model)


def test_the_same_model_goes_on(tmp_path):
    assert run(tmp_path, model())[0].latest() is not None


def test_a_key_that_the_checkpoint_is_older_than_has_its_default(tmp_path):
    older = model()
    del older["portrait"]
    run(tmp_path, older)


def test_another_model_is_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds another model: model\.num_layers, model\.portrait differ"):
        run(tmp_path, model(num_layers=3, portrait=True))


def test_an_average_does_not_begin_within_a_run(tmp_path):
    """Its checkpoint has none; said before any process group, with what to do."""
    without, kept = {"ema": {"decay": 0.0}}, {"ema": {"decay": 0.9}}
    with pytest.raises(CheckpointError, match=r"ema\.decay=0\.5, but .*step-00000005 .* training\.start_from="):
        run(tmp_path / "a", model(), without, ema={"decay": 0.5})
    run(tmp_path / "b", model(), kept, ema={"decay": 0.5})
    run(tmp_path / "c", model(), kept)


@pytest.fixture
def other_fails(monkeypatch):
    """Two ranks: what this one does goes well, what the other one does doesn't."""
    monkeypatch.setattr(agreement, "any_rank", lambda mine, groups: True)
    monkeypatch.setattr(agreement, "gather_json", lambda mine, groups: [mine, ("DataError: 3 values are NaN", True)])
    return SimpleNamespace(is_first=False)


def test_weights_that_are_bad_on_another_rank_end_this_one_too(other_fails, monkeypatch, tmp_path):
    """With tensor ranks the others hold none of them, and would wait in the next exchange."""
    monkeypatch.setattr(resume, "together", lambda groups, act: act())
    monkeypatch.setattr(resume, "load_newest", lambda *_, **__: (tmp_path, {"state": TrainState().to_json()}))
    config = SimpleNamespace(checkpoint=SimpleNamespace(on_damaged="stop"))
    with pytest.raises(AgreedError, match="checking the weights failed: rank 1: DataError: 3 values are NaN"):
        load_newest_or_start(config, torch.nn.Linear(1, 1), None, None, other_fails, {})


def test_weights_to_start_from_that_are_not_numbers_are_named(monkeypatch, tmp_path):
    """They are another run's; the first step's loss would be NaN and its samples suspected."""
    monkeypatch.setattr(agreement, "any_rank", lambda mine, groups: mine)
    monkeypatch.setattr(agreement, "gather_json", lambda mine, groups: [mine])
    monkeypatch.setattr(resume, "together", lambda groups, act: act())
    monkeypatch.setattr(resume, "load_newest", lambda *_, **__: None)
    monkeypatch.setattr(resume, "find_checkpoint", lambda path: SimpleNamespace(path=path, resolved={}))
    monkeypatch.setattr(resume, "load", lambda path, model, *_, **__: model.bias.data.fill_(torch.nan))
    config = SimpleNamespace(
        checkpoint=SimpleNamespace(on_damaged="stop"), training=SimpleNamespace(start_from=tmp_path / "stage1")
    )
    with pytest.raises(AgreedError, match=r"weights of .*stage1 are NaN or infinite: bias \(1 of 1 values\); take an"):
        load_newest_or_start(config, torch.nn.Linear(1, 1), None, None, SimpleNamespace(is_first=False), {})


def test_a_history_that_the_first_rank_cannot_open_ends_all(other_fails, tmp_path):
    with pytest.raises(AgreedError, match=r"opening metrics\.jsonl in .* failed: rank 1"):
        open_metrics(SimpleNamespace(run_folder=tmp_path), TrainState(), other_fails)
