"""Video files to frames and back, with PyAV (FFmpeg).

A frame is asked for by the time at which it is shown, never by its number: files of 23.976, 25 or a varying number of
frames per second are cut to 8 or 16 in the same way. Frames come upright (a phone's rotation is applied) and as
stored: pixels may be wider than high (`VideoInfo.pixel_aspect`), which `transforms.resized_size` evens out.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import av
import torch

from megacogvx.errors import DataError

TOLERANCE_SECONDS = 1e-3  # a frame stamped this much late still counts as shown: containers round their time stamps
# Only plain files: a playlist must not make FFmpeg open an address or a pipe.
OPEN_OPTIONS = {"protocol_whitelist": "file"}


@dataclass(frozen=True)
class VideoInfo:
    """What a video's header and first frame say.

    Attributes:
        height, width: pixels of an upright frame, as stored.
        fps: mean frames per second.
        duration: seconds, from the first frame to the end of the last; 0.0 when the header doesn't say.
        pixel_aspect: width of a pixel divided by its height, as shown; 1.0 for square pixels.
    """

    height: int
    width: int
    fps: float
    duration: float
    pixel_aspect: float


def probe(path: Path) -> VideoInfo:
    """Open a video and decode its first frame.

    Raises:
        DataError: the file is missing, is no video, or its first frame can't be decoded.
    """
    with _opened(path) as (container, stream):
        for frame, _, _ in _stamped(container, stream, expected=0.0):
            height, width, _ = _upright(frame).shape
            aspect = float(stream.sample_aspect_ratio or 1)
            aspect = 1 / aspect if frame.rotation % 180 else aspect  # a quarter turn swaps width and height
            return VideoInfo(height, width, _fps(stream), _duration(container, stream), aspect)
    raise DataError(f"video {path} holds no frame; is it truncated?")


def frames_at(path: Path, times: Sequence[float]) -> Iterator[torch.Tensor]:
    """Decode the frame that is shown at each of `times`, one at a time, so that memory holds one frame.

    Args:
        path: a video file of any format that FFmpeg reads.
        times: seconds since the first frame, ascending; the same frame may be asked for again.

    Yields:
        uint8 tensors [H, W, 3], RGB, upright.

    Raises:
        DataError: the file is missing, damaged, or ends before the last of `times`.
    """
    assert all(a <= b for a, b in pairwise(times)), "times must ascend"
    if not times:
        return
    pending, shown, end, pixels = list(reversed(times)), None, 0.0, None
    for frame, start, stop in _timed_frames(path, times[0]):
        while pending and pending[-1] + TOLERANCE_SECONDS < start:
            pixels = _upright(shown or frame) if pixels is None else pixels
            pending.pop()
            yield pixels
        if not pending:
            return
        shown, end, pixels = frame, stop, None
    while pending and shown is not None and pending[-1] < end - TOLERANCE_SECONDS:
        pixels = _upright(shown) if pixels is None else pixels
        pending.pop()
        yield pixels
    if pending:
        hint = _truncation_hint(path, end)
        raise DataError(f"video {path}: no frame at {pending[-1]:.3f} s, decoding ends at {end:.3f} s{hint}")


def read_frames(
    path: Path, start: float = 0.0, count: int | None = None, fps: float | None = None, fewer: bool = False
) -> torch.Tensor:
    """Decode several frames into memory.

    Args:
        path: a video file.
        start: seconds since the first frame.
        count: number of frames; None for all that follow (then `fps` must be None).
        fps: frames per second to take; None for every frame of the file (then `start` and `count` count those).
        fewer: without `fps`, a file that ends before `count` frames gives what it has.

    Returns:
        uint8 tensor [T, H, W, 3], RGB.

    Raises:
        DataError: as `frames_at`; also when there are fewer than `count` frames, or none, or their size changes.
    """
    if fps is not None:
        assert count is not None, "a number of frames per second needs a number of frames"
        return torch.stack(list(frames_at(path, clip_times(start, count, fps))))
    frames = []
    for frame, when, _ in _timed_frames(path, start):
        if when >= start - TOLERANCE_SECONDS:
            frames.append(_upright(frame))
            if frames[-1].shape != frames[0].shape:
                sizes = " and then ".join(f"{each.shape[0]} x {each.shape[1]}" for each in (frames[0], frames[-1]))
                raise DataError(f"video {path} changes its size at {when:.3f} s: frames of {sizes} pixels")
        if count is not None and len(frames) == count:
            break
    if not frames or (count is not None and len(frames) < count and not fewer):
        raise DataError(f"video {path} has {len(frames)} frames from {start:.3f} s on, not {count or 'one or more'}")
    return torch.stack(frames)


def clip_times(start: float, count: int, fps: float) -> list[float]:
    """Return the times, in seconds, of `count` frames at `fps` frames per second from `start` on."""
    return [start + index / fps for index in range(count)]


def write_video(path: Path, frames_THW3: torch.Tensor | Iterable[torch.Tensor], fps: float, crf: int = 6) -> None:
    """Write frames as an H.264 MP4, in full colour resolution (4:4:4) and with one thread, so that bytes repeat.

    At 64 x 112 pixels crf 6 keeps 45.8 dB, and halved colour (4:2:0) no more than 36.5 dB at any crf (measured).

    Args:
        path: the file; it appears complete or not at all.
        frames_THW3: uint8 [T, H, W, 3], or an iterable of [H, W, 3].
        fps: frames per second; a number with a fraction is kept to 1/1000.
        crf: x264's constant rate factor: 0 loses only the rounding of RGB to YUV, 18 looks the same to most eyes.
    """
    rate = Fraction(round(fps * 1000), 1000)
    with written_beside(path) as beside, av.open(str(beside), "w", format="mp4") as container:
        stream: Any = None
        for frame in frames_THW3:
            if stream is None:
                options = {"crf": str(crf), "preset": "medium", "threads": "1"}
                stream = container.add_stream("libx264", rate=rate, options=options)
                stream.height, stream.width, stream.pix_fmt = frame.shape[0], frame.shape[1], "yuv444p"
            image = av.VideoFrame.from_ndarray(frame.contiguous().numpy(), format="rgb24")
            container.mux(stream.encode(image))
        assert stream is not None, "a video needs at least one frame"
        container.mux(stream.encode())


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Give a temporary name in `path`'s folder; what is written there is synced and renamed to `path` at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    try:
        yield beside
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def is_file(path: Path) -> bool:
    """Whether there is a file that can be looked for: a name may be too long, a server may not answer."""
    try:
        return path.is_file()
    except OSError:
        return False


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    if not is_file(path):
        raise DataError(f"video {path} does not exist")
    try:
        # A title or a maker's name in another encoding than UTF-8 is common, and tells nothing that is used here.
        # Absolute: FFmpeg takes what stands before a colon in "talk: first part.mp4" for a protocol.
        with av.open(str(path.absolute()), options=OPEN_OPTIONS, metadata_errors="replace") as container:
            if not container.streams.video:
                raise DataError(f"{path} has no video stream")
            yield container, container.streams.video[0]
    except av.error.FFmpegError as error:
        hint = "is it truncated or of another format?"
        raise DataError(f"video {path} can't be decoded ({error.strerror}); {hint}") from None


def _timed_frames(path: Path, start: float) -> Iterator[tuple[Any, float, float]]:
    """Yield (frame, when it appears, when it goes), in seconds; the first one is shown at `start` or before it."""
    if start > 0:
        with _opened(path) as (container, stream):
            frames = _sought(container, stream, start)
            first = next(frames, None)
            if first is not None and first[1] <= start + TOLERANCE_SECONDS:
                yield from chain([first], frames)
                return
    with _opened(path) as (container, stream):  # opened anew: after a seek that failed, some containers stay lost
        yield from _stamped(container, stream, expected=0.0)


def _sought(container: Any, stream: Any, start: float) -> Iterator[tuple[Any, float, float]]:
    """Go to the key frame at or before `start`, and yield from there on; nothing if the container can't."""
    try:
        container.seek(int(start / stream.time_base) + (stream.start_time or 0), stream=stream, backward=True)
    except av.error.FFmpegError:
        return
    yield from _stamped(container, stream, expected=math.inf)


def _stamped(container: Any, stream: Any, expected: float) -> Iterator[tuple[Any, float, float]]:
    """Yield frames with their times; without a time stamp, one appears when the last one goes, or at `expected`."""
    for frame in container.decode(stream):
        if frame.is_corrupt:
            raise DataError(f"video {container.name}: the frame at {expected:.3f} s is damaged")
        if frame.pts is not None:
            expected = float((frame.pts - (stream.start_time or 0)) * stream.time_base)
        yield frame, expected, expected + 1 / _fps(stream)
        expected += 1 / _fps(stream)


def _truncation_hint(path: Path, end: float) -> str:
    """Return what to add to a message when the header promises more than was decoded."""
    with _opened(path) as (container, stream):
        said, fps = _duration(container, stream), _fps(stream)
    return f", but its header says {said:.3f} s: is it truncated?" if said > end + 2 / fps else ""


def _upright(frame: Any) -> torch.Tensor:
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24"))
    quarters = round(frame.rotation / 90) % 4  # counterclockwise
    return torch.rot90(pixels, quarters, (0, 1)).contiguous() if quarters else pixels


def _fps(stream: Any) -> float:
    return float(stream.average_rate or stream.guessed_rate or 25)


def _duration(container: Any, stream: Any) -> float:
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return container.duration / av.time_base if container.duration else 0.0
