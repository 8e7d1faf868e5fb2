"""`group_norm_moments` on the GPU: two passes over the clip forward, two backward, SiLU within them.

The kernels (csrc/group_norm_moments/) see every value; what lies between, a few numbers per sample and channel, is done
here in fp64: moments of channels merged into groups, and over ranks where several hold the clip. On the CPU torch's own
group norm is as good, and there is no C++ version.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megacogvx_kernels import compiled
from megacogvx_kernels.checks import packed
from megacogvx_kernels.group_norm_moments.exchange import merge_moments

CHUNK, WIDEST = 8, 2048  # values of an access; channels of a channels-last clip
MOMENTS, GRADIENT_SUMS, APPLY, APPLY_GRADIENT = range(4)  # what one call of the op computes


def takes(x_BCTHW: torch.Tensor) -> bool:
    """Tell whether the compiled op answers this call; see `compiled.answers`."""
    _, channels, *place = x_BCTHW.shape
    eights = channels if _is_channels_last(x_BCTHW) else place[0] * place[1] * place[2]
    fits_kernel = x_BCTHW.dtype != torch.float64 and eights % CHUNK == 0 and channels <= WIDEST
    if not compiled.answers("group_norm_moments", x_BCTHW, fits_kernel, on_cpu=False):
        return False
    _register()
    return True


def group_norm_moments(
    x_BCTHW: torch.Tensor,
    weight_C: torch.Tensor,
    bias_C: torch.Tensor,
    groups: int,
    eps: float,
    activation: bool,
    group: dist.ProcessGroup | None,
    op: Any = None,
) -> torch.Tensor:
    """Call the kernels; see the public function for the arguments.

    Args:
        op: in place of `torch.ops.megacogvx.group_norm`, for tests.
    """
    op = op or torch.ops.megacogvx.group_norm
    y_BCTHW: torch.Tensor = _GroupNorm.apply(x_BCTHW, weight_C, bias_C, groups, eps, activation, group, op)
    return y_BCTHW


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BCTHW: torch.Tensor, weight_C: torch.Tensor, bias_C: torch.Tensor, groups: int, eps: float,
        activation: bool, group: dist.ProcessGroup | None, op: Any,
    ) -> torch.Tensor:  # fmt: skip
        is_last = _is_channels_last(x_BCTHW)
        flat = _flat(x_BCTHW, is_last)
        mean_BG, variance_BG, count = _moments(x_BCTHW, flat, is_last, groups, group, op)
        per_group = x_BCTHW.shape[1] // groups
        mean_BC, variance_BC = (x.repeat_interleave(per_group, dim=1) for x in (mean_BG, variance_BG))
        zeros_BC = torch.zeros_like(mean_BC)
        affine = (weight_C.to(mean_BC).expand_as(mean_BC), bias_C.to(mean_BC).expand_as(mean_BC))
        columns = torch.stack([mean_BC, (variance_BC + eps).rsqrt(), *affine, zeros_BC, zeros_BC], dim=2).float()
        ctx.save_for_backward(x_BCTHW, weight_C, columns, torch.as_tensor(count))
        ctx.settings = (is_last, activation, group, op, bias_C.dtype, groups)
        return _unflat(op(flat, flat, columns, APPLY, is_last, activation), x_BCTHW, is_last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_BCTHW, weight_C, columns_BC6, count = ctx.saved_tensors
        is_last, activation, group, op, bias_dtype, groups = ctx.settings
        flat, gradient = _flat(x_BCTHW, is_last), _flat(gradients[0], is_last)
        sums_BC2 = op(flat, gradient, columns_BC6, GRADIENT_SUMS, is_last, activation).double().sum(dim=1)
        bias_gradient, weight_gradient = sums_BC2.sum(dim=0).unbind(1)
        x_gradient = None
        if ctx.needs_input_grad[0]:
            means_BG2 = (sums_BC2 * weight_C.double()[:, None]).unflatten(1, (groups, -1)).sum(dim=2)
            if group is not None:
                dist.all_reduce(means_BG2, group=group)
            means_BC2 = (means_BG2 / count).repeat_interleave(x_BCTHW.shape[1] // groups, dim=1)
            columns_BC6 = torch.cat([columns_BC6[:, :, :4], means_BC2.float()], dim=2)
            found = op(flat, gradient, columns_BC6, APPLY_GRADIENT, is_last, activation)
            x_gradient = _unflat(found, x_BCTHW, is_last)
        return x_gradient, weight_gradient.to(weight_C.dtype), bias_gradient.to(bias_dtype), *(None,) * 5


def _moments(
    x_BCTHW: torch.Tensor, flat: torch.Tensor, is_last: bool, groups: int, group: dist.ProcessGroup | None, op: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:
    """Return mean and variance `[B, G]` in fp64, of all ranks, and the number of values they are of.

    A channel's sums are taken of x - x[0], so that a mean far from zero costs no digits.
    """
    batch, channels, frames = x_BCTHW.shape[:3]
    positions = x_BCTHW[0, 0].numel()
    shift_BC = x_BCTHW[:, :, 0, 0, 0].double()
    columns = torch.zeros(batch, channels, 6, device=x_BCTHW.device)
    columns[:, :, 0] = shift_BC
    sums_BC2 = op(flat, flat, columns, MOMENTS, is_last, False).double().sum(dim=1)
    mean_BC = shift_BC + sums_BC2[:, :, 0] / positions
    deviations_BC = (sums_BC2[:, :, 1] - sums_BC2[:, :, 0].square() / positions).clamp(min=0)
    mean_BGc, deviations_BGc = mean_BC.unflatten(1, (groups, -1)), deviations_BC.unflatten(1, (groups, -1))
    mean_BG = mean_BGc.mean(dim=2)
    deviations_BG = (deviations_BGc + positions * (mean_BGc - mean_BG[..., None]).square()).sum(dim=2)
    values = positions * channels // groups
    if group is None:
        return mean_BG, deviations_BG / values, float(values)
    return merge_moments(mean_BG, deviations_BG, frames, values // frames, group)


def _is_channels_last(x_BCTHW: torch.Tensor) -> bool:
    return not x_BCTHW.is_contiguous() and x_BCTHW.is_contiguous(memory_format=torch.channels_last_3d)


def _flat(x_BCTHW: torch.Tensor, is_last: bool) -> torch.Tensor:
    """`[B, C, P]`, or `[B, P, C]` of a channels-last clip; a copy only where another layout or start asks for it."""
    if is_last:
        return packed(x_BCTHW.permute(0, 2, 3, 4, 1)).flatten(1, 3)
    return packed(x_BCTHW).flatten(2)


def _unflat(flat: torch.Tensor, like_BCTHW: torch.Tensor, is_last: bool) -> torch.Tensor:
    batch, channels, frames, height, width = like_BCTHW.shape
    if is_last:
        return flat.view(batch, frames, height, width, channels).permute(0, 4, 1, 2, 3)
    return flat.view(like_BCTHW.shape)


@cache
def _register() -> None:
    torch.library.register_fake("megacogvx::group_norm")(_shape)


def _shape(
    x: torch.Tensor, gradient: torch.Tensor, columns_BC6: torch.Tensor, kind: int, is_last: bool, activation: bool
) -> torch.Tensor:
    if kind in (APPLY, APPLY_GRADIENT):
        return torch.empty_like(x)
    batch, positions, channels = x.shape if is_last else (x.shape[0], x.shape[2], x.shape[1])
    chunk = 512 if is_last else 16384
    return x.new_empty((batch, (positions + chunk - 1) // chunk, channels, 2), dtype=torch.float32)
