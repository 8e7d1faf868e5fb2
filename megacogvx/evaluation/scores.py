"""What an evaluation measured of each file, and their means: as a table, JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rich.table import Table

from megacogvx.data.video import written_beside
from megacogvx.log import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class Scores:
    """What was measured of one video or image.

    Attributes:
        file: its name.
        frames, height, width: what was compared, frames and pixels.
        psnr: dB; infinite for an equal reconstruction.
        ssim: at most 1.
        perceptual: distance between features, 0 for an equal reconstruction.
        flickering, flickering_reconstruction: of source and reconstruction, in grey levels; None for an image.
    """

    file: str
    frames: int
    height: int
    width: int
    psnr: float
    ssim: float
    perceptual: float
    flickering: float | None
    flickering_reconstruction: float | None

    def row(self, perceptual_name: str) -> dict[str, str | int | float | None]:
        """Return the scores as they are written; `perceptual` under the name of its net."""
        return {perceptual_name if name == "perceptual" else name: value for name, value in vars(self).items()}


def averages(scores: Sequence[Scores]) -> Scores:
    """Return the means over files, flickering over videos alone; frames and size are 0 where files differ."""

    def same(name: str) -> int:
        values = {getattr(score, name) for score in scores}
        return int(values.pop()) if len(values) == 1 else 0

    def mean(name: str) -> float | None:
        values = [getattr(score, name) for score in scores if getattr(score, name) is not None]
        return fmean(values) if values else None

    return Scores(
        f"mean of {len(scores)}", same("frames"), same("height"), same("width"),
        psnr=fmean(score.psnr for score in scores),
        ssim=fmean(score.ssim for score in scores),
        perceptual=fmean(score.perceptual for score in scores),
        flickering=mean("flickering"),
        flickering_reconstruction=mean("flickering_reconstruction"),
    )  # fmt: skip


def table(title: str, scores: Sequence[Scores], means: Scores, perceptual_name: str) -> Table:
    """Return what is printed."""
    result = Table(title=title, title_justify="left", caption="flickering: mean |next frame - frame| in grey levels")
    for name in ("file", "T x H x W", "PSNR dB", "SSIM", perceptual_name, "flickering", "of the source"):
        result.add_column(name, justify="left" if name == "file" else "right", overflow="fold")
    for score in (*scores, means):
        if score is means:
            result.add_section()
        size = f"{score.frames or '-'} x {score.height or '-'} x {score.width or '-'}"
        shown = (score.flickering_reconstruction, score.flickering)
        result.add_row(
            score.file, size, f"{score.psnr:.2f}", f"{score.ssim:.4f}", f"{score.perceptual:.4f}",
            *("-" if value is None else f"{value:.3f}" for value in shown),
        )  # fmt: skip
    return result


def write(
    folder: Path, facts: dict[str, str | bool], scores: Sequence[Scores], means: Scores, perceptual_name: str
) -> None:
    """Write reconstruction.json (infinite PSNRs and NaN as null, since JSON can't say them) and reconstruction.csv."""
    rows = [score.row(perceptual_name) for score in (*scores, means)]
    finite = [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()} for row in rows]
    content = {**facts, "perceptual": perceptual_name, "mean": finite[-1], "files": finite[:-1]}
    with written_beside(folder / "reconstruction.json") as beside:
        beside.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with written_beside(folder / "reconstruction.csv") as beside:
        beside.write_text(text.getvalue())
    logger.info("wrote %s and .csv", folder / "reconstruction.json")
