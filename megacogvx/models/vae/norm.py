"""The two normalisations, each with the SiLU that always follows it.

Plain in the encoder, steered by the latents in the decoder (spatially conditioned normalisation of MoVQ,
arXiv 2209.09002, over clips).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megacogvx.models.vae.frames import FrameSpan
from megacogvx_kernels.group_norm_moments import group_norm_moments


class GroupNormSiLU(nn.Module):
    """Group normalisation over all frames of a clip, on whatever ranks they lie, then SiLU."""

    def __init__(self, channels: int, groups: int, eps: float) -> None:
        """Make the normalisation of `channels` channels."""
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(
        self,
        x_BCTHW: torch.Tensor,
        frames: FrameSpan,
        latents_BCTHW: torch.Tensor | None = None,
        overwrite: bool = False,
    ) -> torch.Tensor:
        """Return `[B, C, T, H, W]`, in the place of x if `overwrite` and without a graph; latents are for decoders."""
        return group_norm_moments(
            x_BCTHW, self.weight, self.bias, self.groups, self.eps, activation=True, group=frames.group,
            overwrite=overwrite,
        )  # fmt: skip


class SpatialNormSiLU(nn.Module):
    """silu(GroupNorm(x) * Y(z) + B(z)): scale and shift of every position come from the latents z that are decoded."""

    def __init__(self, channels: int, latent_channels: int, groups: int, eps: float) -> None:
        """Make the normalisation of `channels` channels."""
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.conv_y = nn.Conv3d(latent_channels, channels, 1)
        self.conv_b = nn.Conv3d(latent_channels, channels, 1)

    def forward(
        self, x_BCTHW: torch.Tensor, frames: FrameSpan, latents_BCTHW: torch.Tensor, overwrite: bool = False
    ) -> torch.Tensor:
        """Return `[B, C, T, H, W]` for the latents (of this chunk, on this rank) that x grows from.

        Without a graph the result takes the place of x if `overwrite`.
        """
        # A 1 x 1 x 1 convolution commutes with copying cells to their neighbours; before it, it costs a fraction.
        y, b = (spread(conv(latents_BCTHW), frames, *x_BCTHW.shape[3:]) for conv in (self.conv_y, self.conv_b))
        x_BCTHW = group_norm_moments(
            x_BCTHW, self.weight, self.bias, self.groups, self.eps, group=frames.group, overwrite=overwrite
        )
        rows_BCThrW = x_BCTHW.unflatten(3, (b.shape[3], -1))
        if torch.is_grad_enabled():
            return F.silu(torch.addcmul(b, rows_BCThrW, y).flatten(3, 4))
        torch.addcmul(b, rows_BCThrW, y, out=rows_BCThrW)
        return F.silu(x_BCTHW, inplace=True)


def spread(z_BCTHW: torch.Tensor, frames: FrameSpan, height: int, width: int) -> torch.Tensor:
    """Copy latent cells to the frames and columns they stand for; rows are left to broadcasting.

    Args:
        z_BCTHW: `[B, C, t, h, w]`.
        frames: the span of the features, at their resolution in time.
        height, width: of the features, multiples of h and w.

    Returns:
        `[B, C, frames.count, h, 1, width]`: cell row i stands for the feature rows i * height / h and on.
    """
    cells, rows, columns = z_BCTHW.shape[2:]
    assert height % rows == 0 and width % columns == 0, (tuple(z_BCTHW.shape), height, width)
    z_BCTHW = _repeat(z_BCTHW, 4, width // columns)
    if frames.first_alone and cells > 1:
        rest = _repeat(z_BCTHW[:, :, 1:], 2, (frames.count - 1) // (cells - 1))
        z_BCTHW = torch.cat([z_BCTHW[:, :, :1], rest], dim=2)
    else:
        z_BCTHW = _repeat(z_BCTHW, 2, frames.count // cells)
    assert z_BCTHW.shape[2] == frames.count, (tuple(z_BCTHW.shape), frames)
    return z_BCTHW.unsqueeze(4)


def _repeat(x: torch.Tensor, axis: int, times: int) -> torch.Tensor:
    return x if times == 1 else x.repeat_interleave(times, dim=axis)
