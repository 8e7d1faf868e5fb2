"""Clips and images as files, and clips.jsonl, the list of them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from pydantic import Field, ValidationError

from megacogvx.config import Section
from megacogvx.data.images import read_image
from megacogvx.data.video import read_frames, written_beside
from megacogvx.errors import DataError

LIST_NAME = "clips.jsonl"


class Clip(Section):
    """One row of clips.jsonl.

    Attributes:
        path: the MP4 (or PNG when `frames` is 1).
        caption: what it shows.
        frames: number of frames.
        height, width: pixels.
        fps: frames per second; None for an image.
        source: name of the video or image it was cut from.
        start: seconds into the source.
    """

    path: Path
    caption: str
    frames: int = Field(ge=1)
    height: int = Field(ge=1)
    width: int = Field(ge=1)
    fps: float | None = Field(gt=0)
    source: str
    start: float = Field(ge=0)

    @property
    def is_image(self) -> bool:
        """Whether the file is a single image."""
        return self.fps is None

    @property
    def seconds(self) -> float:
        """Duration; 0.0 for an image."""
        return 0.0 if self.fps is None else self.frames / self.fps


def read_clips(path: Path) -> list[Clip]:
    """Read a clips.jsonl (or the one in folder `path`); the clips' paths are relative to its folder.

    Raises:
        DataError: the list is missing or empty, or a row isn't what `write_clips` writes.
    """
    path = list_path(path)
    with path.open("rb") as file:
        clips = [parse_clip(line, path, number) for number, line in enumerate(file, start=1)]
    if not clips:
        raise DataError(f"{path} lists no clip")
    return clips


def list_path(path: Path) -> Path:
    """Return the list that `path` names, itself or by its folder.

    Raises:
        DataError: there is none.
    """
    path = path / LIST_NAME if path.is_dir() else path
    if not path.is_file():
        raise DataError(f"{path} does not exist; `megacogvx clips` writes such lists")
    return path


def parse_clip(line: bytes, path: Path, number: int) -> Clip:
    """Return the clip of line `number` of the list `path`.

    Raises:
        DataError: the line isn't what `write_clips` writes.
    """
    try:
        row = json.loads(line)
        return Clip(**{**row, "path": _inside(path.parent, row["path"])})
    except ValidationError as error:
        name, problem = error.errors()[0]["loc"], error.errors()[0]["msg"]
        raise DataError(f"{path} line {number}: {'.'.join(map(str, name))}: {problem}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} line {number} is not a row that `megacogvx clips` writes: {error!r}") from None


def write_clips(path: Path, clips: list[Clip]) -> None:
    """Write the rows of a clips.jsonl, complete or not at all."""
    rows = [{**clip.model_dump(), "path": clip.path.relative_to(path.parent).as_posix()} for clip in clips]
    with written_beside(path) as beside:
        beside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_clip(clip: Clip, first: int = 0, count: int | None = None, stride: int = 1) -> torch.Tensor:
    """Decode `count` frames (None: all) from frame number `first` on, each `stride`-th one.

    Returns:
        uint8 tensor [T, H, W, 3].

    Raises:
        DataError: the file is missing, damaged, or not of the size that its row says.
    """
    count = clip.frames - first if count is None else count
    if clip.fps is None:
        frames = read_image(clip.path)[None]
    else:
        frames = read_frames(clip.path, first / clip.fps, (count - 1) * stride + 1)[::stride]
    found, said = tuple(frames.shape[:3]), (count, clip.height, clip.width)
    if found != said:
        raise DataError(f"clip {clip.path} holds (frames, height, width) = {found}, its row says {said}")
    return frames


def _inside(folder: Path, name: str) -> Path:
    """Return `folder / name`, refusing names that lead out of the folder."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"path {name!r} leads out of the folder of the list")
    return folder / name
