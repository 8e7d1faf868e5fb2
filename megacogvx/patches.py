"""Latents cut into patches, each a video token of the transformer, and put together again (paper, section 2.2).

A patch spans q latent frames and p x p latent cells. What goes with the tokens of a whole pack is in `pack_layout.py`.
"""

from __future__ import annotations

import torch

from megacogvx.errors import DataError

Triple = tuple[int, int, int]


def repeated_frames(frames: int, q: int) -> int:
    """Return how many copies of the first latent frame make `frames` divide by the temporal patch q (section 2.2)."""
    return (q - frames % q) % q


def grid_of(frames: int, height: int, width: int, patch: Triple) -> Triple:
    """Return tokens along (t, h, w) of latents of this size, repeated frames counted.

    Raises:
        DataError: height or width doesn't divide by the patch.
    """
    q, ph, pw = patch
    if frames < 1 or height % ph or width % pw or not height or not width:
        raise DataError(
            f"latents of {frames} x {height} x {width} (T, H, W) don't fit the patch {patch}; the nearest size that "
            f"does: {max(1, frames)} x {max(ph, height // ph * ph)} x {max(pw, width // pw * pw)}"
        )
    return (frames + repeated_frames(frames, q)) // q, height // ph, width // pw


def patchify(latents_TCHW: torch.Tensor, patch: Triple) -> torch.Tensor:
    """Cut latents into rows, one per token, in (t, h, w) order; the first frame is repeated where q asks for it.

    Args:
        latents_TCHW: `[T, C, H, W]`.
        patch: (q, p, p).

    Returns:
        `[t * h * w, P]` with P = C * q * p * p in (c, q, p, p) order, the order of the published weights.
    """
    frames, channels, height, width = latents_TCHW.shape
    q, ph, pw = patch
    t, h, w = grid_of(frames, height, width, patch)
    copies = repeated_frames(frames, q)
    if copies:
        latents_TCHW = torch.cat([latents_TCHW[:1].expand(copies, -1, -1, -1), latents_TCHW])
    cells = latents_TCHW.reshape(t, q, channels, h, ph, w, pw)
    return cells.permute(0, 3, 5, 2, 1, 4, 6).reshape(t * h * w, channels * q * ph * pw)


def unpatchify(rows_VP: torch.Tensor, grid: Triple, patch: Triple, repeated: int = 0) -> torch.Tensor:
    """Put rows back together: the inverse of `patchify`, repeated frames dropped.

    Returns:
        `[T, C, H, W]`.
    """
    t, h, w = grid
    q, ph, pw = patch
    channels = rows_VP.shape[1] // (q * ph * pw)
    cells = rows_VP.reshape(t, h, w, channels, q, ph, pw).permute(0, 4, 3, 1, 5, 2, 6)
    return cells.reshape(t * q, channels, h * ph, w * pw)[repeated:]
