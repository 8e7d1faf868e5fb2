"""The tiny stages run in sequence, each from the last one's weights: the script as a whole, and two stages of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megacogvx.checkpoint.directory import CheckpointDirectory
from megacogvx.checkpoint.streamed import StreamedCheckpoint
from megacogvx.config import load_config
from megacogvx.testing.tiny_dataset import tiny_encoder, write_tiny_dataset
from megacogvx.training.config import TrainConfig
from megacogvx.training.train import pretrain

PROJECT = Path(__file__).resolve().parents[2]
ENCODER = tiny_encoder(text_length=32, text_width=64, latent_channels=16)
SIZES = {2: ((1, 6, 8), (3, 6, 10)), 3: ((3, 8, 10), (5, 8, 12))}
NEVER = 1e-9  # a learning rate that leaves the weights what they were


def weights(folder):
    checkpoint = StreamedCheckpoint(CheckpointDirectory(folder / "checkpoints").latest(), "model")
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def test_a_stage_begins_with_the_last_ones_weights_grown_to_a_temporal_patch(tmp_path):
    for stage in (2, 3):
        write_tiny_dataset(tmp_path / f"data{stage}", 8, encoder=ENCODER, sizes=SIZES[stage])
        start = "null" if stage == 2 else tmp_path / "run2"
        own = (f"data.paths=[{tmp_path / f'data{stage}'}]", f"training.run_folder={tmp_path / f'run{stage}'}",
               f"training.start_from={start}", "training.steps=2", "tracking.tensorboard=false")  # fmt: skip
        slow = () if stage == 2 else (f"optimizer.learning_rate={NEVER}", "optimizer.weight_decay=0")
        config = PROJECT / "examples" / "configs" / f"progressive_tiny_stage{stage}.yaml"
        pretrain(load_config(TrainConfig, config, (*own, *slow)))
    before, after = weights(tmp_path / "run2"), weights(tmp_path / "run3")
    grown = {name for name in before if before[name].shape != after[name].shape}
    assert grown == {"embedding.video_proj.weight", "head.proj.weight", "head.proj.bias"}
    for name in before.keys() - grown:
        assert torch.allclose(before[name], after[name], atol=1e-6), name
    projected = before["embedding.video_proj.weight"].reshape(128, 16, 1, 4).expand(-1, -1, 2, -1) / 2
    assert torch.allclose(after["embedding.video_proj.weight"].reshape(128, 16, 2, 4), projected, atol=1e-6)


@pytest.mark.slow
def test_four_stages_and_image_to_video_follow_one_another(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [PROJECT / "examples" / "progressive_tiny.sh", tmp_path / "run"], cwd=PROJECT, env=environment, text=True,
        capture_output=True, timeout=290,
    )  # fmt: skip
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    for stage in ("stage1", "stage2", "stage3", "stage4", "i2v"):
        rows = (tmp_path / "run" / "runs" / stage / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows] == list(range(6))
    grown = [line.partition("grown: ")[2] for line in text.splitlines() if "grown: " in line]
    assert grown[0] == grown[2] == "nothing"
    assert "embedding.video_proj.weight" in grown[1] and "head.proj.weight" in grown[1]
    assert grown[3] == "embedding.video_proj.weight"
