"""The files of one call of `generate`, and which of them are finished, so that an interrupted one goes on.

OUT/sample-000.mp4    the video, and OUT/sample-000/frame-0000.png ..., OUT/sample-000-sheet.png where asked for
OUT/sample-000.json   the settings it was made with, written last: a video without it is made anew
OUT/.latents/...      what is sampled and not yet decoded
OUT/texts.jsonl       what prompts were written out as; `answers.py`
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from megacogvx.data.images import write_png
from megacogvx.data.video import written_beside
from megacogvx.errors import ConfigError
from megacogvx.inference.video_file import contact_sheet, write_mp4, write_png_frames
from megacogvx.log import get_logger

SHEET_COLUMNS, SHEET_ROWS = 4, 2
TEXTS = "texts.jsonl"
VARYING = ("text", "layout", "seconds")  # facts that may differ between a run and the one that goes on with it
Facts = dict[str, Any]

logger = get_logger(__name__)


@dataclass(frozen=True)
class Outputs:
    """Where videos go.

    Attributes:
        folder: OUT.
        png, sheet: whether frames and a contact sheet are written as pictures too.
        overwrite: make videos anew that are there with other settings.
    """

    folder: Path
    png: bool = False
    sheet: bool = False
    overwrite: bool = False

    def is_finished(self, name: str, facts: Facts) -> bool:
        """Return whether a video and all that is asked for beside it are there.

        Raises:
            ConfigError: it is there with other settings, and `overwrite` isn't set.
        """
        sidecar = self._path(name, ".json")
        if not sidecar.is_file():
            return False
        differing = _differing(_read(sidecar), facts)
        if differing and not self.overwrite:
            raise ConfigError(
                f"{sidecar} was made with {', '.join(differing)}; choose another --output, or make it anew with "
                "--overwrite"
            )
        return not differing and all(path.exists() for path in self._asked(name))

    def write(self, name: str, frames_THWC: torch.Tensor, facts: Facts) -> None:
        """Write a video's files, its settings last, and drop its latents.

        Args:
            name: stem of the files.
            frames_THWC: uint8 `[T, H, W, 3]`.
            facts: the settings; `fps` among them.
        """
        self._path(name, ".json").unlink(missing_ok=True)  # it tells of another video from here on
        write_mp4(frames_THWC, self._path(name, ".mp4"), facts["fps"])
        if self.png:
            write_png_frames(frames_THWC, self.folder / name)
        if self.sheet:
            write_png(self._path(name, "-sheet.png"), contact_sheet(frames_THWC, SHEET_COLUMNS, SHEET_ROWS))
        with written_beside(self._path(name, ".json")) as beside:
            beside.write_text(json.dumps(facts, indent=1) + "\n")
        self._latents(name).unlink(missing_ok=True)
        frames, height, width, _ = frames_THWC.shape
        logger.info("wrote %s: %d frames of %d x %d", self._path(name, ".mp4"), frames, height, width)

    def keep_latents(self, name: str, latents_TCHW: torch.Tensor, facts: Facts) -> None:
        """Keep sampled latents until they are decoded."""
        with written_beside(self._latents(name)) as beside:
            tensors = {"latents": latents_TCHW.cpu().contiguous()}
            save_file(tensors, beside, metadata={"facts": json.dumps(facts)})

    def kept_facts(self, name: str, facts: Facts) -> Facts | None:
        """Return what stands beside latents that were kept with these settings; None: there are none."""
        try:
            with safe_open(self._latents(name), framework="pt") as file:
                kept = json.loads((file.metadata() or {}).get("facts", "{}"))
        except (OSError, ValueError, SafetensorError):  # a damaged file is sampled again
            return None
        return None if _differing(kept, facts) else kept

    def kept_latents(self, name: str) -> torch.Tensor:
        """Read latents that were kept: fp32 `[T, C, H, W]`."""
        return load_file(self._latents(name))["latents"]

    def clear(self) -> None:
        """Remove the folder of latents, if none are left in it."""
        folder = self._latents("x").parent
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()

    def _path(self, name: str, ending: str) -> Path:
        return self.folder / f"{name}{ending}"

    def _latents(self, name: str) -> Path:
        return self.folder / ".latents" / f"{name}.safetensors"

    def _asked(self, name: str) -> list[Path]:
        frames = [self.folder / name / "frame-0000.png"] if self.png else []
        return [self._path(name, ".mp4"), *frames, *([self._path(name, "-sheet.png")] if self.sheet else [])]


def _read(sidecar: Path) -> Mapping[str, Any]:
    try:
        facts = json.loads(sidecar.read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _differing(made: Mapping[str, Any], facts: Facts) -> list[str]:
    """Return "name=old (now new)" of the facts that aren't as they were, in the words of JSON."""
    wanted = json.loads(json.dumps(facts))
    return [
        f"{name}={made.get(name)!r} (now {value!r})"
        for name, value in wanted.items()
        if name not in VARYING and made.get(name) != value
    ]
