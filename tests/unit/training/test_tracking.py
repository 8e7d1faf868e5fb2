"""Rows reach TensorBoard once each, and the run folder tells how the run was started."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageSequence

from megacogvx.config import build_config
from megacogvx.errors import ConfigError
from megacogvx.training import tracking
from megacogvx.training.profiler import profile_window
from megacogvx.training.tracking import Tracking, TrackingConfig, git_state, record_start

GROUPS = SimpleNamespace(rank=0, world_size=3, device=torch.device("cpu"))


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read the event files back."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_numbers_become_curves_and_a_resumed_run_replaces_its_steps(tmp_path):
    for first, loss in ((0, 1.0), (2, 5.0)):
        with Tracking(TrackingConfig(), tmp_path, first, {}, writes=True) as sent:
            for step in range(first, 4):
                sent.add({"step": step, "loss": loss, "by": [0.5, None], "layout": "dp1", "guard": True})
    found = curves(tmp_path)
    assert found.keys() == {"loss", "by/0"}
    assert found["loss"] == [(0, 1.0), (1, 1.0), (2, 5.0), (3, 5.0)]


def test_a_video_becomes_an_animation_that_tensorboard_plays(tmp_path):
    frames_THWC = (torch.arange(3)[:, None, None, None] * 100).expand(3, 4, 6, 3).to(torch.uint8)
    with Tracking(TrackingConfig(), tmp_path, 0, {}, writes=True) as sent:
        sent.add_video("video-0", frames_THWC, 7)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (event,) = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Images("video-0")
    assert (event.step, event.height, event.width) == (7, 4, 6)
    with Image.open(io.BytesIO(event.encoded_image_string)) as image:
        shown = [frame.convert("RGB").getpixel((2, 2))[0] for frame in ImageSequence.Iterator(image)]
    assert shown == [0, 100, 200]


def test_other_ranks_and_a_run_without_tracking_write_nothing(tmp_path):
    for config, writes in ((TrackingConfig(), False), (TrackingConfig(tensorboard=False), True)):
        with Tracking(config, tmp_path, 0, {}, writes=writes) as sent:
            sent.add({"step": 0, "loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_weights_and_biases_gets_the_same_numbers_and_redone_steps_anew(tmp_path, monkeypatch):
    """A row at a lower `step=` of its own would be dropped: the steps of the run are an axis among the numbers."""
    ids, axes, rows = [], [], []
    fake = SimpleNamespace(
        define_metric=lambda name, step_metric: axes.append((name, step_metric)),
        log=rows.append,  # takes no step
        finish=lambda exit_code: None,
    )

    def init(**settings):
        ids.append(settings["id"])
        return fake

    video = SimpleNamespace(init=init, Video=lambda frames_TCHW, fps: frames_TCHW.shape)
    monkeypatch.setitem(sys.modules, "wandb", video)
    config = TrackingConfig.model_construct(**{**TrackingConfig(tensorboard=False).model_dump(), "wandb_project": "p"})
    for folder, step in (("one", 3), ("one", 2), ("other", 0)):
        with Tracking(config, tmp_path / folder / "run", step, {"a": 1}, writes=True) as sent:
            sent.add({"step": step, "loss": 2.0})
    sent.add_video("video-0", torch.zeros(5, 4, 6, 3, dtype=torch.uint8), 7)
    first, again, other = ids
    assert first == again != other, "a run goes on as itself; folders of one name are different runs"
    assert set(axes) == {("*", "step")} and len(axes) == 3
    assert rows[:3] == [{"loss": 2.0, "step": step} for step in (3, 2, 0)]
    assert rows[3] == {"video-0": (5, 3, 4, 6), "step": 7}


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_weights_and_biases_without_its_package_is_refused_at_once():
    with pytest.raises(ConfigError, match=r"wandb_project='p': the package wandb is not installed"):
        build_config(TrackingConfig, {"wandb_project": "p"})


def test_starts_are_kept_with_versions_and_code(tmp_path):
    for step in (0, 40):
        record_start(tmp_path, step, GROUPS)
    first, second = (json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines())
    assert (first["step"], second["step"], first["ranks"]) == (0, 40, 3)
    assert first["versions"]["torch"] == torch.__version__ and first["versions"]["megacogvx"]


def test_git_state_names_commit_and_changed_files(tmp_path):
    assert git_state(tmp_path) is None

    def git(*words):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", "-C", tmp_path, *identity, *words], check=True, capture_output=True, text=True)

    git("init", "-q")
    (tmp_path / "a.py").write_text("1")
    git("add", "a.py")
    git("commit", "-q", "-m", "one")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD").stdout.strip(), "changed": []}
    (tmp_path / "a.py").write_text("2")
    assert git_state(tmp_path)["changed"] == ["a.py"]


def test_the_profiled_window_is_the_one_that_was_asked_for(tmp_path):
    config = TrackingConfig(profile_from=2, profile_steps=2)
    with profile_window(config, tmp_path, GROUPS) as profiler:
        for step in range(6):
            with torch.profiler.record_function(f"step {step}"):
                torch.ones(2).sum()
            profiler.step()
    names = {
        event.get("name") for event in json.loads((tmp_path / "profile" / "rank-0.json").read_text())["traceEvents"]
    }
    assert {f"step {step}" for step in range(6) if f"step {step}" in names} == {"step 2", "step 3"}


def test_ranks_that_are_not_asked_for_are_not_profiled(tmp_path):
    config = TrackingConfig(profile_from=0, profile_ranks=(1,))
    with profile_window(config, tmp_path, GROUPS) as profiler:
        profiler.step()
    assert not (tmp_path / "profile").exists() and tracking.PACKAGES
