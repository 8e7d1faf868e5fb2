"""`megacogvx clips`: cut captioned videos into short clips and images of several sizes and durations.

captions -> plan (which files, pure) -> cut (decode a row's frames once, resize to each size, write) -> clips.jsonl.
A clip's name holds a hash of everything that decides its pixels, so a restart cuts only what is not there yet.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import xxhash

from megacogvx.curation.captions import Caption, read_captions
from megacogvx.data.clips import LIST_NAME, Clip, write_clips
from megacogvx.data.images import write_png
from megacogvx.data.transforms import Size, crop, multiple_size, resize, resized_size
from megacogvx.data.video import TOLERANCE_SECONDS, VideoInfo, clip_times, frames_at, is_file, probe, write_video
from megacogvx.errors import ConfigError, DataError
from megacogvx.log import get_logger, progress

EXAMPLE = """\
Captions are rows of video (file name), caption, and start and end, or image_at, in seconds; or of image and caption.
Writes OUTPUT/*.mp4, OUTPUT/*.png and OUTPUT/clips.jsonl. Finished clips are kept when the same command is started
again.

example: clips of 17 and 9 frames and single images, 64 and 48 pixels high or wide, 16 frames a second
  megacogvx clips --captions examples/data/captions.jsonl --videos videos --output clips \\
      --short-sides 64 48 --frames 1 9 17 --fps 16
"""

NAMED = 50  # missing videos that an error lists
STEM_BYTES = 150  # of a video's name that its clips' names repeat: file systems take names of 255 bytes
UNDECODABLE = "caption of a part that can't be decoded"
logger = get_logger(__name__)


@dataclass(frozen=True)
class ClipRules:
    """How clips are cut: every combination of the three lists, as far as a caption's part is long enough."""

    short_sides: tuple[int, ...]  # pixels
    frames: tuple[int, ...]  # 1 is an image
    fps: tuple[float, ...]
    multiple: int  # pixels; both sides divide by it
    crf: int  # x264's rate factor


@dataclass(frozen=True)
class Cut:
    """A clip to be written.

    Attributes:
        clip: its row.
        resized: (height, width) that its frames are resized to before the crop.
        source_bytes: size of its video's file.
    """

    clip: Clip
    resized: Size
    source_bytes: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `megacogvx clips`."""
    parser.add_argument("--captions", type=Path, required=True, help="JSONL, CSV or Parquet file of captions")
    parser.add_argument("--output", type=Path, required=True, help="folder for the clips")
    add_rule_arguments(parser)
    parser.add_argument("--crf", type=int, default=6, help="x264 rate factor; 0 is the most exact (default 6)")
    parser.add_argument("--skip-bad", action="store_true", help="leave out and count bad rows instead of stopping")


def add_rule_arguments(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add the arguments that say which clips the rows of a caption file give."""
    parser.add_argument("--videos", type=Path, help="folder of the videos (default: the caption file's folder)")
    parser.add_argument("--short-sides", type=int, nargs="+", default=[64], help="pixels (default 64)")
    parser.add_argument("--frames", type=int, nargs="+", default=[1, 9, 17], help="per clip, 8k+1 (default 1 9 17)")
    parser.add_argument("--fps", type=float, nargs="+", default=[8.0], help="frames per second (default 8)")
    parser.add_argument("--multiple", type=int, default=16, help="both sides divide by this many pixels (default 16)")


def rules_of(arguments: argparse.Namespace, crf: int) -> ClipRules:
    """Return what these options ask for.

    Raises:
        ConfigError: an option is out of range.
    """
    sides, frames, fps = (tuple(dict.fromkeys(x)) for x in (arguments.short_sides, arguments.frames, arguments.fps))
    rules = ClipRules(sides, frames, fps, arguments.multiple, crf)
    check_rules(rules)
    return rules


def run(arguments: argparse.Namespace) -> None:
    """Run `megacogvx clips`.

    Raises:
        ConfigError: an option is out of range.
        DataError: the captions are wrong, a video is missing or damaged (unless `--skip-bad`), or no clip comes out.
    """
    rules = rules_of(arguments, arguments.crf)
    captions = read_captions(arguments.captions)
    videos = arguments.videos or arguments.captions.parent
    skipped: Counter[str] = Counter()
    clips = cut_all(captions, videos, arguments.output, rules, arguments.skip_bad, skipped)
    for reason, count in sorted(skipped.items()):
        logger.info("left out: %d x %s", count, reason)
    if not clips:
        raise DataError(f"no clip could be cut from {len(captions)} captions; left out: {dict(skipped)}")
    write_clips(arguments.output / LIST_NAME, clips)
    images = sum(clip.is_image for clip in clips)
    logger.info("%d clips and %d images in %s", len(clips) - images, images, arguments.output / LIST_NAME)


def check_rules(rules: ClipRules) -> None:
    """Raise `ConfigError` when an option is out of range."""
    for frames in rules.frames:
        if frames < 1 or frames % 8 != 1:
            near = max(1, round((frames - 1) / 8) * 8 + 1)
            raise ConfigError(f"--frames {frames} is not 8k+1, which VAE and patches need; nearest: {near}")
    if not all(0 < fps <= 240 for fps in rules.fps):
        raise ConfigError(f"--fps {' '.join(map(str, rules.fps))} must lie in (0, 240]")
    if rules.multiple < 1 or min(rules.short_sides) < rules.multiple:
        sides = " ".join(map(str, rules.short_sides))
        raise ConfigError(f"--short-sides {sides} must not be below --multiple {rules.multiple} >= 1")
    if not 0 <= rules.crf <= 51:
        raise ConfigError(f"--crf {rules.crf} must lie in 0..51")


def cut_all(
    captions: Sequence[Caption], videos: Path, output: Path, rules: ClipRules, skip_bad: bool, skipped: Counter[str]
) -> list[Clip]:
    """Cut every row; return the clips in the captions' order, and count in `skipped` what is left out, by reason."""
    clips: list[Clip] = []
    for cuts in plan_all(captions, videos, output, rules, skip_bad, skipped):
        with _left_out(skip_bad, skipped, UNDECODABLE):
            cut_row(videos / cuts[0].clip.source, cuts, rules)
            clips += [cut.clip for cut in cuts]
    return clips


def plan_all(
    captions: Sequence[Caption], videos: Path, output: Path, rules: ClipRules, skip_bad: bool, skipped: Counter[str]
) -> Iterator[list[Cut]]:
    """Yield the clips of each row that gives any; nothing is written.

    Raises:
        DataError: videos are missing or damaged, or a part lies beyond its video's end, and `skip_bad` is off.
    """
    infos = probe_all(captions, videos, skip_bad, skipped)
    for caption in progress(captions, "clips", total=len(captions)):
        if caption.video not in infos:
            skipped["caption of a missing or damaged video"] += 1
            continue
        cuts: list[Cut] = []
        with _left_out(skip_bad, skipped, UNDECODABLE):
            cuts = plan_row(caption, infos[caption.video], videos, output, rules, skipped)
        if cuts:
            yield cuts


@contextmanager
def _left_out(skip_bad: bool, skipped: Counter[str], reason: str) -> Iterator[None]:
    """Count a `DataError` as `reason` where bad rows are to be left out."""
    try:
        yield
    except DataError as error:
        if not skip_bad:
            raise
        logger.warning("left out: %s", error)
        skipped[reason] += 1


def probe_all(captions: Sequence[Caption], videos: Path, skip_bad: bool, skipped: Counter[str]) -> dict[str, VideoInfo]:
    """Look into every named video once, before anything is cut.

    Raises:
        DataError: videos are missing (up to `NAMED` are named) or one can't be decoded, and `skip_bad` is off.
    """
    names = list(dict.fromkeys(caption.video for caption in captions))
    absent = dict.fromkeys(name for name in names if not is_file(videos / name))
    if absent and not skip_bad:
        listed = ", ".join(islice(absent, NAMED)) + (f" and {len(absent) - NAMED} more" if len(absent) > NAMED else "")
        raise DataError(f"{len(absent)} of {len(names)} videos are not in {videos}: {listed}")
    skipped.update({"video that is missing": len(absent)} if absent else {})
    infos = {}
    for name in progress([name for name in names if name not in absent], "look into the videos"):
        with _left_out(skip_bad, skipped, "video that can't be decoded"):
            infos[name] = probe(videos / name)
    return infos


def plan_row(
    caption: Caption, info: VideoInfo, videos: Path, output: Path, rules: ClipRules, skipped: Counter[str]
) -> list[Cut]:
    """Return the clips that a row gives: consecutive windows within its part, for every size, duration and fps.

    Raises:
        DataError: the part lies beyond the video's end, or the video has gone.
    """
    last = caption.end if caption.end is not None else caption.image_at
    if info.duration and last is not None and last > info.duration + 1 / info.fps:
        raise DataError(f"caption at {last} s of {caption.video}, which lasts {info.duration:.3f} s: {caption.caption}")
    try:
        stamp = (videos / caption.video).stat().st_size
    except OSError as error:
        raise DataError(f"video {videos / caption.video} can't be read: {error.strerror}") from None
    stem = Path(caption.video).stem.encode()[:STEM_BYTES].decode(errors="ignore")
    windows, cuts = _windows(caption, rules, skipped), []
    for short_side in rules.short_sides:
        if short_side > min(info.height, info.width * info.pixel_aspect):
            skipped[f"caption of a video smaller than {short_side} pixels"] += 1
            continue
        resized = resized_size(info.height, info.width, short_side, info.pixel_aspect)
        height, width = multiple_size(*resized, rules.multiple)
        for frames, fps, start in windows:
            key = f"{caption.video} {stamp} {start:.6f} {frames} {fps} {resized} {height} {width} {rules.crf}"
            name = f"{stem}-{start:08.3f}s-{frames}f-{height}x{width}-{_hash(key)}"
            clip = Clip(
                path=output / f"{name}.{'mp4' if fps else 'png'}", caption=caption.caption, frames=frames,
                height=height, width=width, fps=fps, source=caption.video, start=start,
            )  # fmt: skip
            cuts.append(Cut(clip, resized, stamp))
    return cuts


def cut_row(video: Path, cuts: Sequence[Cut], rules: ClipRules) -> None:
    """Write those of one row's clips that are not there yet: decode each frame once, resize it once to each size."""
    cuts_at: dict[float, list[Cut]] = {}
    for cut in cuts:
        if not cut.clip.path.is_file():
            for time in clip_times(cut.clip.start, cut.clip.frames, cut.clip.fps or 1.0):
                cuts_at.setdefault(time, []).append(cut)
    collected: dict[Path, list[torch.Tensor]] = {}
    times = sorted(cuts_at)
    for time, frame in zip(times, frames_at(video, times), strict=True):
        resized = {size: resize(frame[None], size) for size in {cut.resized for cut in cuts_at[time]}}
        for cut in cuts_at[time]:
            clip, frames = cut.clip, collected.setdefault(cut.clip.path, [])
            frames.append(crop(resized[cut.resized], (clip.height, clip.width))[0])
            if len(frames) == clip.frames:
                _write(clip, collected.pop(clip.path), rules)


def _windows(caption: Caption, rules: ClipRules, skipped: Counter[str]) -> list[tuple[int, float | None, float]]:
    """Return (frames, fps, start) of every clip in a row's part: windows follow each other without overlap."""
    if caption.image_at is not None or caption.end is None:
        return [(1, None, caption.image_at or 0.0)]
    windows: list[tuple[int, float | None, float]] = []
    for frames in rules.frames:
        if frames == 1:
            windows.append((1, None, (caption.start + caption.end) / 2))
            continue
        for fps in rules.fps:
            last_frame = caption.start + (frames - 1) / fps
            count = math.ceil((caption.end - last_frame - TOLERANCE_SECONDS) * fps / frames)  # it lies before the end
            windows += [(frames, fps, caption.start + turn * frames / fps) for turn in range(max(0, count))]
            if count <= 0:
                skipped[f"caption of a part too short for {frames} frames at {fps:g} fps"] += 1
    return windows


def _write(clip: Clip, frames: Sequence[torch.Tensor], rules: ClipRules) -> None:
    if clip.fps is None:
        write_png(clip.path, frames[0])
    else:
        write_video(clip.path, frames, clip.fps, rules.crf)


def _hash(key: str) -> str:
    return xxhash.xxh3_64_hexdigest(key.encode())  # of half as many digits, two of 80,000 "ID/video.mp4" would be equal
