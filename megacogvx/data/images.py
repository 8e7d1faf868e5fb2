"""Image files to pixels and back, with the same decoder as videos (PNG, JPEG, WebP, ...)."""

from __future__ import annotations

from pathlib import Path

import av
import torch
from PIL import Image, UnidentifiedImageError

from megacogvx.data.video import is_file, read_frames, written_beside
from megacogvx.errors import DataError

MAX_PIXELS = 1 << 26  # 67 million, about 8192 x 8192: 0.2 GB decoded


def read_image(path: Path) -> torch.Tensor:
    """Decode an image, upright.

    Returns:
        uint8 tensor [H, W, 3], RGB; an alpha channel is dropped.

    Raises:
        DataError: the file is missing, damaged or no image.
    """
    if not is_file(path):
        raise DataError(f"image {path} does not exist")
    return read_frames(path, count=1)[0]


def check_image(path: Path, max_pixels: int = MAX_PIXELS) -> None:
    """Read an image's header, so that none is decoded that would fill the memory.

    Raises:
        DataError: the file is missing, is no image, or has more than `max_pixels`.
    """
    if not is_file(path):
        raise DataError(f"image {path} does not exist")
    try:
        with Image.open(path) as header:
            width, height = header.size
    except Image.DecompressionBombError as error:
        raise DataError(f"image {path} is too large: {error}; make it smaller first") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise DataError(f"image {path} can't be read ({error}); give a PNG, JPEG or WebP file") from None
    if width * height > max_pixels:
        raise DataError(
            f"image {path} has {width} x {height} pixels, more than {max_pixels:,} in all; make it smaller first, "
            "about the size of the video"
        )


def write_png(path: Path, image_HW3: torch.Tensor) -> None:
    """Write uint8 pixels [H, W, 3] as a PNG, without loss; the file appears complete or not at all."""
    codec = av.CodecContext.create("png", "w")
    codec.height, codec.width, codec.pix_fmt = image_HW3.shape[0], image_HW3.shape[1], "rgb24"
    frame = av.VideoFrame.from_ndarray(image_HW3.contiguous().numpy(), format="rgb24")
    packets = [*codec.encode(frame), *codec.encode(None)]
    with written_beside(path) as beside:
        beside.write_bytes(b"".join(bytes(packet) for packet in packets))
