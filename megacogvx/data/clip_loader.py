"""Clips and images as pixels, for VAE training: clips.jsonl -> batches of equal shape.

The order and every crop are drawn from (seed, step, place in the step), so that which pixels step 1000 sees depends
neither on the number of ranks nor on a restart; the loader's only state is the step. An image step (T = 1) comes
every 1 / image_share steps, for all ranks at once (joint image-video training, CogVideoX paper section 3.1).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import xxhash
from pydantic import Field

from megacogvx import draws
from megacogvx.config import Section
from megacogvx.data.clips import Clip, read_clip, read_clips
from megacogvx.data.transforms import crop, to_model_range
from megacogvx.errors import ConfigError, DataError
from megacogvx.log import get_logger


class ClipsConfig(Section):
    """Config section `clips`: the pixels that VAE training sees."""

    paths: list[str] = Field(default_factory=list, description="clips.jsonl files, or the folders that hold them")
    frames: int = Field(17, ge=1, description="frames of a video batch; longer clips give a part, shorter ones nothing")
    fps: tuple[float, ...] = Field((), description="frames per second, drawn for each clip; (): all of the file's")
    height: int = Field(64, ge=1, description="pixels; larger clips are cropped, smaller ones left out")
    width: int = Field(64, ge=1, description="pixels")
    held_out_height: int | None = Field(None, ge=1, description="pixels of held-out clips; None: as in training")
    held_out_width: int | None = Field(None, ge=1, description="pixels of held-out clips; None: as in training")
    clips_per_step: int = Field(4, ge=1, description="over all data ranks")
    image_share: float = Field(0.2, ge=0, le=1, description="of the steps")
    held_out_fraction: float = Field(0.1, ge=0, lt=1, description="of the captioned scenes; at least one unless 0")
    prefetch: int = Field(2, ge=0, description="steps decoded ahead")


@dataclass(frozen=True)
class ClipBatch:
    """One data rank's share of a step: fp32 `video_BCTHW` in [-1, 1] on the CPU; T = 1 in an image step."""

    step: int
    video_BCTHW: torch.Tensor


def split_held_out(clips: list[Clip], fraction: float) -> tuple[list[Clip], list[Clip]]:
    """Split into (training, held out), by scene: sizes, durations and parts of one scene stay together.

    A scene is drawn by a hash of its source and first second, so it stays where it is when the corpus grows.

    Args:
        clips: what to split; the order is kept.
        fraction: chance of a scene to be held out; unless 0, at least one scene is.
    """
    scenes = _scenes(clips)
    chance = {scene: draws.uniform(0, "held-out scene", scene) for scene in scenes.values()}
    if fraction == 0 or not chance:
        return list(clips), []
    limit = max(fraction, min(chance.values()) + 1e-12)
    held_out = {scene for scene, drawn in chance.items() if drawn < limit}
    return [c for c in clips if scenes[c] not in held_out], [c for c in clips if scenes[c] in held_out]


def _scenes(clips: list[Clip]) -> dict[Clip, int]:
    """Return each clip's scene, a 64-bit key that clips share which overlap in time or follow with the same caption."""
    scenes: dict[Clip, int] = {}
    last: Clip | None = None
    end = 0.0
    for clip in sorted(clips, key=lambda c: (c.source, c.start, c.frames)):
        same_source = last is not None and clip.source == last.source
        if last is not None and same_source and (clip.start < end or clip.caption == last.caption):
            scenes[clip] = scenes[last]
        else:
            scenes[clip] = xxhash.xxh3_64_intdigest(f"{clip.source}\0{clip.start:.3f}".encode())
            end = 0.0
        last, end = clip, max(end, clip.start + clip.seconds)
    return scenes


@dataclass
class ClipLoader:
    """Batches for one data rank, from `start_step` on, for ever; decoded ahead in a thread.

    Attributes:
        config: section `clips`.
        seed: the run's seed.
        data_rank, data_size: this rank's place among the data-parallel ranks; it takes places rank, rank + size, ...
        start_step: the first step that iteration yields; all that a resumed run sets, once `check_state` has passed.
        videos, images: training clips that are large and long enough.
        held_out: clips that training never sees, for PSNR.

    Raises:
        ConfigError: `clips.clips_per_step` doesn't divide by the number of data ranks, or no path is given.
        DataError: a list can't be read, or no clip in it is large and long enough.
    """

    config: ClipsConfig
    seed: int
    data_rank: int = 0
    data_size: int = 1
    start_step: int = 0
    videos: list[Clip] = field(init=False)
    images: list[Clip] = field(init=False)
    held_out: list[Clip] = field(init=False)

    def __post_init__(self) -> None:
        config = self.config
        if config.clips_per_step % self.data_size:
            raise ConfigError(
                f"clips.clips_per_step={config.clips_per_step} does not divide by the {self.data_size} data ranks; "
                f"sizes that work: multiples of {self.data_size}"
            )
        if not config.paths:
            raise ConfigError("clips.paths is empty; name a clips.jsonl that `megacogvx clips` wrote")
        every = [clip for path in config.paths for clip in read_clips(Path(path))]
        training, self.held_out = split_held_out([c for c in every if self._fits(c)], config.held_out_fraction)
        self.videos = [clip for clip in training if not clip.is_image]
        self.images = [clip for clip in training if clip.is_image]
        if not self.videos and (config.image_share < 1 or not self.images):
            sizes = {(clip.frames, clip.height, clip.width, clip.fps or 0.0) for clip in every}
            rates = f"clips.fps={config.fps}, " if config.fps else ""
            raise DataError(
                f"no clip is left to train on with clips.frames={config.frames}, {rates}clips.height={config.height}, "
                f"clips.width={config.width}, clips.held_out_fraction={config.held_out_fraction}; the lists hold "
                f"(frames, height, width, fps; 0 for an image): {', '.join(str(size) for size in sorted(sizes))}"
            )
        counts = len(self.videos), len(self.images), len(self.held_out), len(every) - len(training) - len(self.held_out)
        get_logger(__name__).info("clips: %d videos, %d images, %d held out, %d too small or too short", *counts)

    def __iter__(self) -> Iterator[ClipBatch]:
        with ThreadPoolExecutor(max_workers=1) as thread:
            ahead: list[Future[ClipBatch]] = []
            step = self.start_step
            while True:
                while len(ahead) <= self.config.prefetch:
                    ahead.append(thread.submit(self.batch, step + len(ahead)))
                batch = ahead.pop(0).result()
                step += 1
                yield batch

    def batch(self, step: int) -> ClipBatch:
        """Return this rank's share of step `step`; a pure function of (clips, config, seed, step, rank)."""
        places = range(self.data_rank, self.config.clips_per_step, self.data_size)
        image_steps = self._image_steps(step)
        is_image = self._image_steps(step + 1) > image_steps
        turn = image_steps if is_image else step - image_steps
        items = [self._item(is_image, turn, place) for place in places]
        return ClipBatch(step, torch.stack(items))

    def state(self) -> dict[str, Any]:
        """Return what decides, beside the step, which clips a step has; ready for JSON."""
        clips = [[clip.path.name, clip.frames, clip.height, clip.width] for clip in (*self.videos, *self.images)]
        return {
            "seed": self.seed,
            "clips": xxhash.xxh3_64_hexdigest(json.dumps([len(self.videos), clips]).encode()),
            "clips_per_step": self.config.clips_per_step,
            "image_share": self.config.image_share,
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Check that a run that kept `state` goes on with the same clips.

        Args:
            state: of an earlier start; empty in checkpoints from before there was one.

        Raises:
            DataError: it doesn't.
        """
        for name, value in self.state().items():
            if state.get(name, value) != value:
                raise DataError(
                    f"the run was at {name}={state[name]}, this start has {value}: clips would repeat or be left out; "
                    "use the same clips.paths, files, sizes, clips_per_step, image_share and training.seed, or begin "
                    "another run with the weights of this one (training.start_from)"
                )

    def held_out_videos(self) -> Iterator[tuple[Clip, torch.Tensor]]:
        """Yield each held-out clip with its pixels, fp32 [1, 3, T, H, W].

        The first frames, at the first of `clips.fps` that the clip is good for, cropped at the centre.
        """
        size = self.config.held_out_height or self.config.height, self.config.held_out_width or self.config.width
        for clip in self.held_out:
            if clip.height < size[0] or clip.width < size[1]:
                continue
            stride = 1 if clip.is_image else self._strides(clip)[0]
            frames = read_clip(clip, 0, min(clip.frames, self.config.frames), stride)
            yield clip, to_model_range(crop(frames, size))[None]

    def _strides(self, clip: Clip) -> list[int]:
        """Return how many of a video's frames may lie between two that are taken, one for each rate it is good for.

        A rate is one that its own is a multiple of, and for which it is long enough.
        """
        assert clip.fps is not None, clip
        rates = self.config.fps or (clip.fps,)
        ratios = [clip.fps / rate for rate in rates]
        strides = [round(ratio) for ratio in ratios if abs(ratio - round(ratio)) < 0.01]
        return [stride for stride in strides if stride > 0 and (self.config.frames - 1) * stride < clip.frames]

    def _fits(self, clip: Clip) -> bool:
        long_enough = clip.is_image or bool(self._strides(clip))
        return long_enough and clip.height >= self.config.height and clip.width >= self.config.width

    def _image_steps(self, step: int) -> int:
        """Return how many of the steps before `step` are image steps."""
        return int(step * self.config.image_share + 1e-9)

    def _item(self, is_image: bool, turn: int, place: int) -> torch.Tensor:
        """Decode and crop item `place` of image (or video) step number `turn`: fp32 [3, T, H, W]."""
        kind = "image" if is_image else "video"
        pool = (self.images or self.videos) if is_image else self.videos
        count = 1 if is_image else self.config.frames
        epoch, position = divmod(turn * self.config.clips_per_step + place, len(pool))
        clip = pool[_order(len(pool), self.seed, kind, epoch)[position]]

        def drawn(what: str) -> float:
            return draws.uniform(self.seed, f"{kind} {what}", turn, place)

        stride = 1
        if not is_image:
            strides = self._strides(clip)
            stride = strides[int(drawn("fps") * len(strides))]
        first = int(drawn("first frame") * (clip.frames - (count - 1) * stride))
        frames = read_clip(clip, first, count, stride)
        return to_model_range(crop(frames, (self.config.height, self.config.width), (drawn("top"), drawn("left"))))


@lru_cache(maxsize=4)
def _order(count: int, seed: int, kind: str, epoch: int) -> list[int]:
    return draws.permutation(count, seed, f"{kind} order", epoch)
