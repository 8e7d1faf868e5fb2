"""Where the rows of metrics.jsonl also go, TensorBoard by default, Weights & Biases if asked; and how a run started."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

import torch
from PIL import Image
from pydantic import Field, field_validator

from megacogvx.checkpoint.directory import write_durably
from megacogvx.config import Section
from megacogvx.log import get_logger
from megacogvx.parallel.groups import ParallelGroups

PACKAGES = ("megacogvx", "torch", "megatron-core", "transformer-engine", "flash-attn", "apex", "numpy", "transformers")
GIT_SECONDS = 10.0

logger = get_logger(__name__)


class TrackingConfig(Section):
    """Section `tracking`: where the numbers go besides metrics.jsonl, and what is profiled.

    Attributes:
        tensorboard: write RUN/tensorboard.
        wandb_project: also log to this project of Weights & Biases; needs the package wandb.
        profile_from: first step of the profiled window; None profiles nothing.
        profile_steps: its length.
        profile_ranks: ranks that write RUN/profile/rank-N.json, which chrome://tracing and Perfetto open.
    """

    tensorboard: bool = True
    wandb_project: str | None = None
    profile_from: int | None = Field(None, ge=0)
    profile_steps: int = Field(3, ge=1)
    profile_ranks: tuple[int, ...] = (0,)

    @field_validator("wandb_project")
    @classmethod
    def _installed(cls, project: str | None) -> str | None:
        if project is not None and importlib.util.find_spec("wandb") is None:
            raise ValueError("the package wandb is not installed; pip install wandb, or set it to null")
        return project


class Tracking:
    """Sends rows on, from rank 0.

    Of steps that a resumed run does again TensorBoard shows the new rows; Weights & Biases shows the first ones and
    the new ones, at the same place of the axis `step`. Its own count of rows only rises, and rows that went back in it
    would be dropped.

    Args:
        config: section `tracking`.
        folder: the run folder.
        first_step: where this start of the run begins.
        resolved: the resolved config, shown beside the curves.
        writes: whether this rank is the one that writes.
    """

    def __init__(self, config: TrackingConfig, folder: Path, first_step: int, resolved: dict[str, Any], writes: bool):
        self._writer: Any = None
        self._wandb: Any = None
        if writes and config.tensorboard:
            self._writer = _tensorboard(folder / "tensorboard", first_step)
        if writes and config.wandb_project is not None:
            import wandb

            self._wandb = wandb.init(
                project=config.wandb_project,
                name=folder.resolve().name,
                id=_run_id(folder),
                resume="allow",
                dir=str(folder),
                config=resolved,
            )
            self._wandb.define_metric("*", step_metric="step")

    def __enter__(self) -> Tracking:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(error is not None))

    def add(self, row: dict[str, Any]) -> None:
        """Send the numbers of one row; a list becomes one curve per place."""
        numbers = _curves(row)
        if self._writer is not None:
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, row["step"])
        if self._wandb is not None:
            self._wandb.log({**numbers, "step": row["step"]})

    def add_video(self, name: str, frames_THWC: torch.Tensor, step: int, fps: float = 8.0) -> None:
        """Show a video, uint8 `[T, H, W, 3]`, as the animated GIF that TensorBoard plays among its images."""
        if self._writer is not None:
            from tensorboard.compat.proto.summary_pb2 import Summary

            _, height, width, _ = frames_THWC.shape
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif(frames_THWC, fps))
            self._writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)
        if self._wandb is not None:
            import wandb

            video = wandb.Video(frames_THWC.permute(0, 3, 1, 2).numpy(), fps=int(fps))
            self._wandb.log({name: video, "step": step})


def gif(frames_THWC: torch.Tensor, fps: float) -> bytes:
    """Return uint8 frames `[T, H, W, 3]` as an animated GIF that repeats."""
    first, *rest = (Image.fromarray(frame.numpy()) for frame in frames_THWC)
    out = io.BytesIO()
    first.save(out, "GIF", save_all=True, append_images=rest, duration=int(1000 / fps), loop=0)
    return out.getvalue()


def record_start(folder: Path, step: int, groups: ParallelGroups) -> None:
    """Append a row to RUN/starts.jsonl: when, from which step, by which command, with which versions and code."""
    row = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "step": step,
        "ranks": groups.world_size,
        "device": groups.device.type,
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": versions(),
        "git": git_state(Path(__file__).parent),
    }
    with (folder / "starts.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def versions() -> dict[str, str | None]:
    """Return the versions of the packages that decide what a run computes; None for those not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return {"commit", "changed": files that differ from it} of the checkout that holds `folder`, or None."""
    words = ["git", "-C", str(folder)]
    try:
        commit, status = (
            subprocess.run([*words, *rest], capture_output=True, text=True, timeout=GIT_SECONDS, check=True).stdout
            for rest in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.strip(), "changed": [line[3:] for line in status.splitlines()]}


def _run_id(folder: Path) -> str:
    """Return the run's own id for Weights & Biases, kept in its folder: folders of one name are different runs."""
    file = folder / "wandb_id.txt"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(file, uuid4().hex)
    return file.read_text()


def _tensorboard(folder: Path, first_step: int) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        logger.warning("tracking.tensorboard: the package tensorboard is not installed; metrics.jsonl has everything")
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first_step)


def _curves(row: dict[str, Any]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, list):
            numbers |= _curves({f"{name}/{place}": item for place, item in enumerate(value)})
        elif isinstance(value, int | float) and not isinstance(value, bool) and name != "step":
            numbers[name] = value
    return numbers
