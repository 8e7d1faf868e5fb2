"""Resize, crop, and pixels to the models' range and back.

Resizing is `torch.nn.functional.interpolate`, bicubic and antialiased, on uint8: integer arithmetic, so the same bytes
come out with and without AVX2 or AVX-512 (checked; in fp32 they don't), within one level of Pillow's bicubic, and
27 times faster than fp32. FFmpeg's swscale would change with the processor and with FFmpeg's version, and two
machines that encode shards of one corpus must agree.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from megacogvx.errors import DataError

Size = tuple[int, int]  # (height, width), pixels


def resized_size(height: int, width: int, short_side: int, pixel_aspect: float = 1.0) -> Size:
    """Return (height, width) with the aspect ratio kept, as shown, and the shorter of the two equal to `short_side`.

    Args:
        height, width: pixels, as stored.
        short_side: pixels.
        pixel_aspect: width of a stored pixel divided by its height; the result has square pixels.
    """
    shown_width = width * pixel_aspect
    scale = short_side / min(height, shown_width)
    return max(short_side, round(height * scale)), max(short_side, round(shown_width * scale))


def resize(frames_THW3: torch.Tensor, size: Size) -> torch.Tensor:
    """Resize uint8 frames [T, H, W, 3] to `size` = (height, width), bicubic and antialiased; uint8 [T, h, w, 3]."""
    if tuple(frames_THW3.shape[1:3]) == size:
        return frames_THW3
    assert frames_THW3.dtype == torch.uint8, frames_THW3.dtype
    resized = functional.interpolate(frames_THW3.permute(0, 3, 1, 2), size=size, mode="bicubic", antialias=True)
    return resized.permute(0, 2, 3, 1).contiguous()


def crop(frames_THW3: torch.Tensor, size: Size, position: tuple[float, float] = (0.5, 0.5)) -> torch.Tensor:
    """Cut `size` = (height, width) pixels out of frames [T, H, W, 3].

    Args:
        frames_THW3: the frames.
        size: (height, width) to keep.
        position: from (0, 0), top left, to (1, 1), bottom right; (0.5, 0.5) is the centre.

    Raises:
        DataError: the frames are smaller than `size`.
    """
    height, width = frames_THW3.shape[1:3]
    if height < size[0] or width < size[1]:
        raise DataError(f"frames of {height} x {width} pixels can't be cropped to {size[0]} x {size[1]}")
    top = min(int(position[0] * (height - size[0] + 1)), height - size[0])
    left = min(int(position[1] * (width - size[1] + 1)), width - size[1])
    return frames_THW3[:, top : top + size[0], left : left + size[1]]


def cover(frames_THW3: torch.Tensor, size: Size, pixel_aspect: float = 1.0) -> torch.Tensor:
    """Resize uint8 frames [T, H, W, 3] until `size` = (height, width) is covered, and keep the centre of that size.

    Args:
        frames_THW3: the frames, as stored.
        size: of the result, pixels; square ones.
        pixel_aspect: width of a stored pixel divided by its height.
    """
    height, width = frames_THW3.shape[1], frames_THW3.shape[2] * pixel_aspect
    scale = max(size[0] / height, size[1] / width)
    covering = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    return crop(resize(frames_THW3, covering), size)


def multiple_size(height: int, width: int, multiple: int) -> Size:
    """Return the largest (height, width) within the given one that `multiple` divides.

    Raises:
        DataError: a side is shorter than `multiple`.
    """
    if min(height, width) < multiple:
        raise DataError(f"frames of {height} x {width} pixels are smaller than one multiple of {multiple} pixels")
    return height // multiple * multiple, width // multiple * multiple


def to_model_range(frames_THW3: torch.Tensor) -> torch.Tensor:
    """Turn uint8 frames [T, H, W, 3] into fp32 [3, T, H, W] in [-1, 1]: x / 127.5 - 1."""
    return frames_THW3.permute(3, 0, 1, 2).float() / 127.5 - 1


def to_pixels(video_CTHW: torch.Tensor) -> torch.Tensor:
    """Turn [3, T, H, W] in [-1, 1] (values beyond are clamped) into uint8 frames [T, H, W, 3] on the CPU."""
    scaled = (video_CTHW.detach().float().cpu() + 1) * 127.5
    return scaled.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).contiguous()
