"""Synthetic clips of moving shapes, whose captions are true by construction.

What a machine without network trains on: `shape_frames` draws one clip, `write_shapes` makes videos and a caption
file that `megacogvx clips` takes, `write_shape_clip` a clip as `megacogvx clips` leaves it.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from megacogvx import draws
from megacogvx.data.clips import Clip
from megacogvx.data.images import write_png
from megacogvx.data.video import write_video, written_beside

SHAPES = ("square", "disc", "diamond")
COLOURS = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (50, 80, 230), "yellow": (235, 215, 50)}
BACKGROUNDS = {"black": (10, 10, 10), "grey": (110, 110, 110), "white": (240, 240, 240)}
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # (rows, columns)


def shape_frames(number: int, frames: int, height: int, width: int, seed: int = 0) -> tuple[torch.Tensor, str]:
    """Draw clip `number`: one shape that crosses the picture at a constant speed.

    Args:
        number: which clip; shape, colours, direction, place and size are drawn from (seed, number).
        frames: T.
        height, width: pixels.
        seed: of all clips.

    Returns:
        uint8 frames [T, H, W, 3], and the caption, e.g. "A red disc moves left over a grey background.".
    """

    def pick(what: str, names: tuple[str, ...]) -> str:
        return names[int(draws.uniform(seed, f"shape {what}", number) * len(names))]

    shape, direction = pick("kind", SHAPES), pick("direction", tuple(DIRECTIONS))
    colour, background = pick("colour", tuple(COLOURS)), pick("background", tuple(BACKGROUNDS))
    radius = min(height, width) * (0.12 + 0.13 * draws.uniform(seed, "shape size", number))
    aside = 0.25 + 0.5 * draws.uniform(seed, "shape place", number)
    rows, columns = torch.arange(height)[:, None] + 0.5, torch.arange(width)[None, :] + 0.5
    video = torch.empty(frames, height, width, 3, dtype=torch.uint8)
    video[:] = torch.tensor(BACKGROUNDS[background], dtype=torch.uint8)
    for frame in range(frames):
        way = 0.2 + 0.6 * frame / max(1, frames - 1)  # from one fifth of the picture to four fifths
        down, across = (_along(step, way, aside) for step in DIRECTIONS[direction])
        inside = _inside(shape, (rows - down * height).abs(), (columns - across * width).abs(), radius)
        video[frame, inside] = torch.tensor(COLOURS[colour], dtype=torch.uint8)
    return video, f"A {colour} {shape} moves {direction} over a {background} background."


def write_shapes(
    folder: Path, count: int, *, frames: int = 48, height: int = 64, width: int = 96, fps: float = 16, seed: int = 0
) -> Path:
    """Write `count` videos shape-000.mp4, ... and captions.jsonl, which covers each of them as a whole.

    Returns:
        The path of captions.jsonl.
    """
    rows = []
    for number in range(count):
        video, caption = shape_frames(number, frames, height, width, seed)
        name = f"shape-{number:03d}.mp4"
        write_video(folder / name, video, fps)
        rows.append({"video": name, "start": 0.0, "end": frames / fps, "caption": caption})
    with written_beside(folder / "captions.jsonl") as beside:
        beside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "captions.jsonl"


def write_shape_clip(
    folder: Path, number: int, frames: int, height: int, width: int, *, scene: int | None = None, **changes: object
) -> Clip:
    """Write clip `number` at 8 fps, or as an image when `frames` is 1, and return its row of clips.jsonl.

    Args:
        folder: gets NUMBER.mp4 or NUMBER.png.
        number, frames, height, width: as for `shape_frames`.
        scene: the number that is drawn, where it is another.
        changes: fields of the row that are to be others.
    """
    pixels, caption = shape_frames(number if scene is None else scene, frames, height, width)
    fields: dict[str, object] = {"caption": caption, "frames": frames, "height": height, "width": width, "start": 0.0}
    if frames == 1:
        fields |= {"path": folder / f"{number}.png", "fps": None, "source": f"image {number}"}
        write_png(folder / f"{number}.png", pixels[0])
    else:
        fields |= {"path": folder / f"{number}.mp4", "fps": 8.0, "source": f"video {number}"}
        write_video(folder / f"{number}.mp4", pixels, 8)
    return Clip.model_validate({**fields, **changes})


def _along(step: int, way: float, aside: float) -> float:
    """Return the relative position on one axis: `way` when moving forward on it, reversed backward, else `aside`."""
    return aside if step == 0 else way if step > 0 else 1 - way


def _inside(shape: str, rows: torch.Tensor, columns: torch.Tensor, radius: float) -> torch.Tensor:
    """Return the mask [H, W] of pixels whose distances to the centre lie within the shape."""
    if shape == "square":
        return (rows <= radius) & (columns <= radius)
    if shape == "disc":
        return rows.square() + columns.square() <= radius**2
    return rows + columns <= radius
