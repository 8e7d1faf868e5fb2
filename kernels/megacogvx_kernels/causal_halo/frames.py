"""The last frames of a clip as a message, and a message's gradient back: what moves in memory, and what needn't.

Of a channels-last clip of one sample the frames lie in one piece, and are sent as they are. Of any other they are
packed, on a GPU by a kernel (csrc/causal_halo/).
"""

from __future__ import annotations

from functools import cache

import torch

from megacogvx_kernels import compiled


def layout_of(x_BCTHW: torch.Tensor) -> torch.memory_format:
    """Return the layout of the messages of a clip: channels-last or not, the same on every rank of one network.

    A clip of one channel or one position has the same bytes in both; it counts as not channels-last.
    """
    _, channels, _, height, width = x_BCTHW.shape
    is_told_apart = channels > 1 and height * width > 1
    is_last = is_told_apart and x_BCTHW.is_contiguous(memory_format=torch.channels_last_3d)
    return torch.channels_last_3d if is_last else torch.contiguous_format


def as_sent(x_BCTHW: torch.Tensor, layout: torch.memory_format) -> torch.Tensor:
    """Return a view of x, dense in `layout`, that is contiguous, as the backends of torch.distributed want it."""
    return x_BCTHW.permute(0, 2, 3, 4, 1) if layout == torch.channels_last_3d else x_BCTHW


def last_frames(tail_BCTHW: torch.Tensor, layout: torch.memory_format) -> torch.Tensor:
    """Return the frames, dense in `layout`: themselves if they lie in one piece, else a copy.

    Args:
        tail_BCTHW: the last frames of a clip, a view of it.
        layout: of the messages.
    """
    if tail_BCTHW.is_contiguous(memory_format=layout):
        return tail_BCTHW
    clip = _clip_of(tail_BCTHW)
    if clip is not None and layout == torch.contiguous_format and _takes(clip):
        count = tail_BCTHW.shape[2]
        packed: torch.Tensor = torch.ops.megacogvx.halo_pack(clip, clip.shape[2] - count, count)
        return packed
    return tail_BCTHW.contiguous(memory_format=layout)


def add_to_last_frames(gradient_BCTHW: torch.Tensor, message_BCTHW: torch.Tensor) -> None:
    """Add a message's gradient to the last frames of the clip's, in place."""
    first = gradient_BCTHW.shape[2] - message_BCTHW.shape[2]
    if gradient_BCTHW.is_contiguous() and message_BCTHW.is_contiguous() and _takes(gradient_BCTHW):
        torch.ops.megacogvx.halo_unpack_add(gradient_BCTHW, message_BCTHW, first)
    else:
        gradient_BCTHW[:, :, first:] += message_BCTHW


def _takes(clip_BCTHW: torch.Tensor) -> bool:
    fits_kernel = clip_BCTHW.dtype != torch.float64
    if not compiled.answers("causal_halo", clip_BCTHW, fits_kernel, on_cpu=False):
        return False
    _register()
    return True


@cache
def _register() -> None:
    torch.library.register_fake("megacogvx::halo_pack")(_shape_of_message)
    torch.library.register_fake("megacogvx::halo_unpack_add")(_nothing)


def _shape_of_message(clip_BCTHW: torch.Tensor, first: int, count: int) -> torch.Tensor:
    batch, channels, _, height, width = clip_BCTHW.shape
    return clip_BCTHW.new_empty(batch, channels, count, height, width)


def _clip_of(tail_BCTHW: torch.Tensor) -> torch.Tensor | None:
    """Return the contiguous clip `[B, C, T, H, W]` that ends with these frames, or None if they are of no such clip."""
    batch, channels, count, height, width = tail_BCTHW.shape
    frames = tail_BCTHW.stride(1) // (height * width)
    strides = [channels * frames * height * width, frames * height * width, height * width, width, 1]
    first = tail_BCTHW.storage_offset() - (frames - count) * height * width
    if list(tail_BCTHW.stride()) != strides or first < 0:
        return None
    return tail_BCTHW.as_strided((batch, channels, frames, height, width), strides, first)


def _nothing(clip_BCTHW: torch.Tensor, message_BCTHW: torch.Tensor, first: int) -> None:
    """It writes into the clip, and returns nothing."""
