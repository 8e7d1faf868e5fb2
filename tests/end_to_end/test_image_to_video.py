"""An image-to-video training on one process: frozen VAE and T5 beside it, averaged weights, an exact resume."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from megacogvx.checkpoint.directory import CheckpointDirectory
from megacogvx.checkpoint.streamed import StreamedCheckpoint
from megacogvx.checkpoint.whole import read_state
from megacogvx.config import build_config
from megacogvx.conversion.megacogvx import open_part
from megacogvx.conversion.part import ReadOptions
from megacogvx.inference.load import load_transformer
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.groups import initialize, shutdown
from megacogvx.testing.tiny_conditions import write_conditions
from megacogvx.testing.tiny_dataset import write_tiny_dataset
from megacogvx.training import setup
from megacogvx.training.config import TrainConfig
from megacogvx.training.train import pretrain

STEPS = 3


@pytest.fixture(scope="module")
def sections(tmp_path_factory):
    folder = tmp_path_factory.mktemp("i2v")
    values = write_conditions(folder)
    encoder = read_encoder(folder / "dataset")
    write_tiny_dataset(folder / "held_out", 4, encoder=encoder, sizes=((2, 4, 6),), first_id=9000)
    values["ema"] = {"decay": 0.8}
    values["tracking"] = {"tensorboard": True}
    values["validation"] = {
        "paths": [str(folder / "held_out")], "timesteps": [500],
        "videos": 1, "video_steps": 2, "vae": values["image"]["vae"],
    }  # fmt: skip
    return values


def read_encoder(folder):
    from megacogvx.data.indexed import read_manifest

    return read_manifest(folder).encoder


def train(sections, folder: Path, steps: int, **changes) -> list[dict]:
    values = {**sections, **changes}
    values["training"] = {**sections["training"], "steps": steps, "run_folder": str(folder), "validate_every": STEPS}
    pretrain(build_config(TrainConfig, values))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def kept(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    checkpoint = StreamedCheckpoint(CheckpointDirectory(folder / "checkpoints").latest(), kind)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(sections, tmp_path, monkeypatch):
    loads, load = [], setup.load_image_vae
    monkeypatch.setattr(setup, "load_image_vae", lambda *given: loads.append(given) or load(*given))
    whole = train(sections, tmp_path / "whole", STEPS)
    assert len(loads) == 1, "the frozen encoders, a T5 of 9.5 GB among them, are loaded once a start"
    train(sections, tmp_path / "parts", 1)
    parts = train(sections, tmp_path / "parts", STEPS)
    names = ("loss", "grad_norm", "loss_by_interval", "validation_loss", "validation_loss_ema")
    rows = [[[row.get(name) for name in names] for row in run[1:]] for run in (whole, parts)]
    assert rows[0] == rows[1] and parts[0]["loss"] == whole[0]["loss"]
    assert whole[-1]["validation_loss"] != whole[-1]["validation_loss_ema"] > 0
    for kind in ("model", "ema"):
        ours, theirs = kept(tmp_path / "whole", kind), kept(tmp_path / "parts", kind)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours), kind
    assert kept(tmp_path / "whole", "ema").keys() == kept(tmp_path / "whole", "model").keys()
    used_for_sampling(tmp_path / "whole")
    shown_in_tensorboard(tmp_path / "whole")
    found = read_state(CheckpointDirectory(tmp_path / "whole" / "checkpoints").latest())["config"]
    assert found["conventions"]["image_latent_scale"] == "multiply" and found["encoder"]["text_kind"] == "token_ids"


def shown_in_tensorboard(run: Path) -> None:
    """The held-out video stands there as a moving picture of its frames, made of its own first frame."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    (shown,) = events.Images("video-0")
    with Image.open(io.BytesIO(shown.encoded_image_string)) as moving:
        assert (shown.step, moving.n_frames, moving.size) == (STEPS - 1, 5, (48, 32))
    assert [file.name for file in (run / "validation").iterdir()] == [f"step-{STEPS:08d}-video-0.mp4"]


def used_for_sampling(run: Path) -> None:
    """Both sets of weights load for sampling and conversion, and differ."""
    groups = initialize(ParallelConfig(device="cpu"))
    try:
        for weights, kind in (("live", "model"), ("ema", "ema")):
            model, expected = load_transformer(run, groups, torch.float32, weights), kept(run, kind)
            loaded = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            assert expected.keys() == loaded.keys()
            assert all(torch.equal(loaded[name], expected[name]) for name in expected), weights
            part = open_part("transformer", run, ReadOptions(weights=weights))
            assert all(torch.equal(part.tensors.read(name), expected[name]) for name in part.tensors.infos)
        name = "blocks.0.attention.qkv.weight"
        assert not torch.equal(kept(run, "ema")[name], kept(run, "model")[name])
    finally:
        shutdown()


@pytest.mark.slow
def test_the_image_is_seen(sections, tmp_path):
    """Without it, or with other noise on it, the first step's loss is another; the noise, timesteps, texts the same."""
    seen, unseen, noisier = (
        train(sections, tmp_path / name, 1, image={**sections["image"], **image}, ema={}, validation={})[0]["loss"]
        for name, image in (
            ("seen", {"dropout": 0.0}),
            ("unseen", {"dropout": 1.0}),
            ("noisier", {"dropout": 0.0, "noise_log_mean": 0.0}),
        )
    )
    assert len({round(loss, 6) for loss in (seen, unseen, noisier)}) == 3
