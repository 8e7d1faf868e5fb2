"""What an encoding reads: clips that `megacogvx clips` wrote, or the parts of videos that a caption file names.

Both are the same list of clips, planned by the same rules; of the second kind no file is written between, and the
pixels are those of the video itself instead of those of a compressed clip.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch

from megacogvx.curation.captions import read_captions
from megacogvx.curation.clip import Cut, plan_all, rules_of
from megacogvx.data.clips import Clip, read_clip, read_clips
from megacogvx.data.transforms import crop, resize
from megacogvx.data.video import clip_times, frames_at
from megacogvx.errors import DataError
from megacogvx.log import get_logger

logger = get_logger(__name__)


class ReadClip(Protocol):
    """Gives a clip's pixels."""

    def __call__(self, clip: Clip, first: int = 0, count: int | None = None) -> torch.Tensor:
        """Return `count` frames (None: all) from frame number `first` on: uint8 `[T, H, W, 3]`; raises `DataError`."""
        ...


class CutReader:
    """Decodes clips out of the videos that they are parts of: frames at the clip's rate, resized, cropped."""

    def __init__(self, videos: Path, cuts: Iterable[Cut]) -> None:
        """Read the clips of `cuts`, whose sources lie in the folder `videos`."""
        self._videos, self._sizes = videos, {cut.clip.path: cut.resized for cut in cuts}

    def __call__(self, clip: Clip, first: int = 0, count: int | None = None) -> torch.Tensor:
        """Return frames of a clip, see `ReadClip`; one source frame is held in its own size at a time."""
        times = clip_times(clip.start, clip.frames, clip.fps or 1.0)[first:]
        frames = [
            crop(resize(frame[None], self._sizes[clip.path]), (clip.height, clip.width))[0]
            for frame in frames_at(self._videos / clip.source, times[:count])
        ]
        return torch.stack(frames)


def listed(arguments: argparse.Namespace) -> tuple[list[Clip], ReadClip]:
    """Return the clips of `--clips`, or of `--captions`, and what reads them.

    Raises:
        ConfigError: an option is out of range.
        DataError: the list can't be read; of captions also: videos are missing or damaged, and bad ones aren't skipped,
            or they give no clip.
    """
    if arguments.captions is None:
        return read_clips(arguments.clips), read_clip
    rules, captions = rules_of(arguments, crf=0), read_captions(arguments.captions)  # 0: nothing is compressed
    videos, skipped = arguments.videos or arguments.captions.parent, Counter[str]()
    plan = plan_all(captions, videos, arguments.output, rules, arguments.skip_bad, skipped)
    cuts = [cut for row in plan for cut in row]
    for reason, count in sorted(skipped.items()):
        logger.info("left out: %d x %s", count, reason)
    if not cuts:
        raise DataError(f"{arguments.captions}: no clip comes of {len(captions)} captions; left out: {dict(skipped)}")
    return [cut.clip for cut in cuts], CutReader(videos, cuts)
