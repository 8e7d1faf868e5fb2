"""Generated frames to files: H.264 in MP4 that every browser plays, PNG frames, contact sheets.

Browsers and players want colours of half resolution; `data.video.write_video` keeps them whole, for training clips.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import torch

from megacogvx.data.images import write_png
from megacogvx.data.video import written_beside
from megacogvx.errors import ConfigError

BT709 = 1  # FFmpeg's number for the colour matrix, primaries and transfer that players assume
LIMITED_RANGE = 1  # luma 16 .. 235, the range of video
CRF = 17  # x264's constant quality: 0 is lossless, 23 its default; 17 can hardly be told from the frames


def write_mp4(frames_THWC: torch.Tensor, path: Path, fps: float) -> None:
    """Write frames as H.264 in MP4, with the index at the front so that it plays while it loads.

    Args:
        frames_THWC: `[T, H, W, 3]` uint8, RGB; H and W even, which H.264 with halved colours needs.
        path: the file to make; its folder is made too.
        fps: frames per second.

    Raises:
        ConfigError: H or W is odd, or `fps` isn't positive.
    """
    frames, height, width = _checked(frames_THWC)
    if height % 2 or width % 2:
        raise ConfigError(
            f"a video of {height} x {width} pixels (H, W) cannot be written as MP4: both must be even; the nearest "
            f"size that works: {height - height % 2} x {width - width % 2}"
        )
    if not fps > 0:
        raise ConfigError(f"fps={fps} must be positive")
    with written_beside(path) as beside:
        # the name ends in .part, so the format has to be said
        with av.open(str(beside), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.options = {"crf": str(CRF), "preset": "medium"}
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = BT709
            context.color_range = LIMITED_RANGE
            for pixels in frames:
                frame = av.VideoFrame.from_ndarray(pixels.numpy(), format="rgb24")
                container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace="ITU709")))
            container.mux(stream.encode(None))


def write_png_frames(frames_THWC: torch.Tensor, folder: Path) -> None:
    """Write frames `[T, H, W, 3]` uint8 as FOLDER/frame-0000.png and so on, in place of those of another video."""
    frames, _, _ = _checked(frames_THWC)
    for old in folder.glob("frame-*.png"):
        old.unlink()
    for number, pixels in enumerate(frames):
        write_png(folder / f"frame-{number:04d}.png", pixels)


def contact_sheet(frames_THWC: torch.Tensor, columns: int, rows: int = 1, gap: int = 2) -> torch.Tensor:
    """Lay `columns * rows` frames, spread evenly from the first to the last, out as one picture.

    Args:
        frames_THWC: `[T, H, W, 3]` uint8; with fewer frames than places each is shown once, in fewer places.
        columns, rows: places across and down.
        gap: white pixels between frames.

    Returns:
        `[h, w, 3]` uint8.
    """
    frames, height, width = _checked(frames_THWC)
    shown = min(len(frames), columns * rows)
    columns = min(columns, shown)
    rows = -(-shown // columns)
    sheet = torch.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=torch.uint8)
    for place in range(shown):
        number = round(place * (len(frames) - 1) / max(1, shown - 1))
        top, left = place // columns * (height + gap), place % columns * (width + gap)
        sheet[top : top + height, left : left + width] = frames[number]
    return sheet


def _checked(frames_THWC: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    assert frames_THWC.dtype == torch.uint8, frames_THWC.dtype
    assert frames_THWC.dim() == 4, tuple(frames_THWC.shape)
    assert len(frames_THWC), "no frames"
    assert frames_THWC.shape[3] == 3, tuple(frames_THWC.shape)
    return frames_THWC, frames_THWC.shape[1], frames_THWC.shape[2]
