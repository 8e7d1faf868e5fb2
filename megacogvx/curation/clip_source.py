"""What an encoding reads: clips that `megacogvx clips` wrote, or the parts of videos that a caption file names.

Both are the same list of clips, planned by the same rules; of the second kind no file is written between, and the
pixels are those of the video itself instead of those of a compressed clip.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Protocol

import torch

from megacogvx.curation.clip import rules_of
from megacogvx.curation.clip_list import ClipList
from megacogvx.curation.clip_plan import ClipPlan, PlannedClip, plan_clips
from megacogvx.data.clips import Clip, read_clip
from megacogvx.data.transforms import crop, resize
from megacogvx.data.video import clip_times, frames_at
from megacogvx.errors import DataError


class ReadClip(Protocol):
    """Gives a clip's pixels."""

    def __call__(self, clip: Clip, first: int = 0, count: int | None = None) -> torch.Tensor:
        """Return `count` frames (None: all) from frame number `first` on: uint8 `[T, H, W, 3]`; raises `DataError`."""
        ...


class CutReader:
    """Decodes clips out of the videos that they are parts of: frames at the clip's rate, resized, cropped."""

    def __init__(self, videos: Path) -> None:
        """Read clips whose sources lie in the folder `videos`."""
        self._videos = videos

    def __call__(self, clip: Clip, first: int = 0, count: int | None = None) -> torch.Tensor:
        """Return frames of a `PlannedClip`, see `ReadClip`; one source frame is held in its own size at a time."""
        assert isinstance(clip, PlannedClip), clip
        video = self._videos / clip.source
        self._check_size(video, clip)
        times = clip_times(clip.start, clip.frames, clip.fps or 1.0)[first:]
        frames = [
            crop(resize(frame[None], clip.resized), (clip.height, clip.width))[0]
            for frame in frames_at(video, times[:count])
        ]
        return torch.stack(frames)

    def _check_size(self, video: Path, clip: PlannedClip) -> None:
        try:
            size = video.stat().st_size
        except OSError as error:
            raise DataError(f"video {video} can't be read: {error.strerror}") from None
        if size != clip.source_bytes:
            raise DataError(
                f"video {video} has {size} bytes, it had {clip.source_bytes} when its clips were planned; remove the "
                "dataset's folder and begin again"
            )


def listed(arguments: argparse.Namespace, rank: int = 0, ranks: int = 1) -> tuple[ClipList, ReadClip]:
    """Return the clips of `--clips`, or of `--captions`, and what reads them.

    Args:
        arguments: of the verb.
        rank, ranks: which of the processes this is, that look into the videos together.

    Raises:
        ConfigError: an option is out of range.
        DataError: the list can't be read; of captions also: videos are missing or damaged, and bad ones aren't skipped,
            or they give no clip.
    """
    if arguments.captions is None:
        return ClipList.from_file(arguments.clips), read_clip
    rules = rules_of(arguments, crf=0)  # 0: nothing is compressed
    videos = arguments.videos or arguments.captions.parent
    plan = ClipPlan(arguments.captions, videos, arguments.output, rules, arguments.skip_bad)
    return plan_clips(plan, rank, ranks), CutReader(videos)
