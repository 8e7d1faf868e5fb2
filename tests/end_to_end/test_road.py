"""The whole road with the commands that a user types: videos, clips, VAE, dataset, two layouts, a video, a report."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import av
import pytest
import yaml

from megacogvx.testing.moving_shapes import write_shapes
from megacogvx.testing.tiny_text_encoder import build_tiny_text_encoder

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("runs", HERE / "runs.py")
assert _spec is not None and _spec.loader is not None
runs = importlib.util.module_from_spec(_spec)
sys.modules["runs"] = runs
_spec.loader.exec_module(runs)

SLOW_RUNS = [pytest.param(run, marks=pytest.mark.slow) for run in runs.RUNS[1:]]
LOSS_BOUND = 2e-5  # relative, between layouts after several optimizer steps
VAE = {
    "vae": {"preset": "tiny", "block_out_channels": [4, 4, 8, 8], "norm_num_groups": 2, "latent_channels": 4},
    "clips": {"frames": 9, "height": 32, "width": 32, "clips_per_step": 2},
    "optimizer": {"learning_rate": 2e-3, "warmup_steps": 0},
    "training": {"steps": 4, "validate_every": 2},
}
TRANSFORMER = {
    "model": {
        "preset": "tiny", "num_layers": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
        "text_embed_dim": 16, "max_text_seq_length": 12,
    },
    "data": {"tokens_per_pack": 128, "packs_per_step": 2},
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0, "decay_steps": 100},
    "training": {"seed": 3},
}  # fmt: skip


def megacogvx(*arguments: object, ranks: int = 1, status: int = 0) -> str:
    """Run one verb as a user does, under torchrun for several ranks; return what it wrote to stderr."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"] if ranks > 1 else []
    command = [sys.executable, "-m", *launcher, "megacogvx", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == status, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stderr


@pytest.fixture(scope="session")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips, a VAE of four steps and the dataset that it encoded."""
    folder = tmp_path_factory.mktemp("road")
    captions = write_shapes(folder / "videos", 4)
    rows = [json.loads(line) for line in captions.read_text().splitlines()]
    build_tiny_text_encoder(folder / "text", [row["caption"] for row in rows], width=16, layers=1, vocabulary=64)
    sizes = ("--short-sides", 32, "--frames", 1, 9)
    megacogvx("clips", "--captions", captions, "--output", folder / "clips", *sizes)
    (folder / "vae.yaml").write_text(yaml.safe_dump(VAE))
    paths = (f"clips.paths=[{folder / 'clips'}]", f"training.run_folder={folder / 'vae'}")
    megacogvx("train-vae", "--config", folder / "vae.yaml", *paths)
    encoders = ("--vae", folder / "vae", "--text-encoder", folder / "text", "--text-length", 12)
    megacogvx("encode", "--clips", folder / "clips", *encoders, "--output", folder / "dataset")
    (folder / "train.yaml").write_text(yaml.safe_dump(TRANSFORMER))
    return folder


@pytest.fixture(scope="session")
def reference(road: Path) -> Path:
    """The run on one process that the others are held to."""
    return train(road, runs.REFERENCE)


def train(road: Path, run: runs.Run) -> Path:
    """Do all parts of a run; return its folder."""
    folder = road / run.name.replace(" ", "-")
    for part in run.parts:
        settings = (f"data.paths=[{road / 'dataset'}]", f"training.run_folder={folder}", f"training.steps={part.stop}")
        megacogvx("train", "--config", road / "train.yaml", *settings, *part.overrides, ranks=part.ranks)
    return folder


def rows_of(run_folder: Path) -> list[dict]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("run", [runs.RUNS[0], *SLOW_RUNS], ids=lambda run: run.name)
def test_losses_do_not_depend_on_the_layout_nor_on_a_restart(road: Path, reference: Path, run: runs.Run) -> None:
    expected, actual = rows_of(reference), rows_of(train(road, run))
    assert [row["step"] for row in actual] == list(range(runs.STEPS))
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=LOSS_BOUND)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=50 * LOSS_BOUND)
        assert {name: ours[name] for name in ("samples", "tokens", "pack_fill", "balance", "lr")} == {
            name: theirs[name] for name in ("samples", "tokens", "pack_fill", "balance", "lr")
        }


def test_generated_video_has_the_asked_size_and_the_report_shows_it(road: Path, reference: Path) -> None:
    samples, report = road / "samples", road / "report.html"
    sizes = ("--frames", 9, "--height", 32, "--width", 48, "--steps", 2)
    models = ("--checkpoint", reference, "--vae", road / "vae", "--text-encoder", road / "text")
    megacogvx("generate", *models, "--prompt", "a red square moves", *sizes, "--output", samples)
    (video,) = samples.glob("*.mp4")
    with av.open(str(video)) as container:
        shapes = [frame.to_ndarray(format="rgb24").shape for frame in container.decode(video=0)]
    assert shapes == [(32, 48, 3)] * 9
    parts = ("--vae-run", road / "vae", "--train-run", reference, "--samples", samples, "--dataset", road / "dataset")
    megacogvx("report", *parts, "--output", report)
    page = report.read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and "data:video/mp4;base64," in page


def test_vae_metrics_hold_psnr_of_held_out_clips(road: Path) -> None:
    measured = [row["psnr"] for row in rows_of(road / "vae") if "psnr" in row]
    assert len(measured) == 2 and all(3 < value < 60 for value in measured)


def test_another_model_in_the_run_folder_is_refused(road: Path, reference: Path) -> None:
    folders = (f"data.paths=[{road / 'dataset'}]", f"training.run_folder={reference}")
    settings = (*folders, "training.steps=4", "model.num_layers=3")
    message = megacogvx("train", "--config", road / "train.yaml", *settings, status=2)
    assert "model.num_layers" in message and "Traceback" not in message
