"""Winograd's F(2, 3) along time: two frames of a causal convolution for four products with a kernel in place of six.

Of four frames in a row d0 to d3 and the temporal taps w0, w1, w2, each a 3 x 3 convolution of a frame,

    m0 = w0 (d0 - d2)    m1 = (w0 + w1 + w2) / 2 (d1 + d2)    m2 = (w0 - w1 + w2) / 2 (d2 - d1)    m3 = w2 (d1 - d3)

give the frames m0 + m1 + m2 and m1 - m2 - m3 (Lavin and Gray, arXiv 1509.09308, section 4.1). The sums cost little
beside convolutions of many channels, and as each result sums fewer products it is no less exact in fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

# Sums of weights and frames that were rounded to bf16 would be rounded once more.
DTYPES = (torch.float32, torch.float64)
# With fewer channels on either side the sums cost more than the products they save.
FEWEST_CHANNELS = 64
Kernels = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def pays(x_BCTHW: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether `convolve_pairs` serves this input: wide, exact enough, and on a processor.

    On a GPU the library that convolves chooses its own way.
    """
    wide, taps = min(weight.shape[:2]) >= FEWEST_CHANNELS, tuple(weight.shape[2:])
    return wide and taps == (3, 3, 3) and x_BCTHW.device.type == "cpu" and x_BCTHW.dtype in DTYPES


def pair_kernels(weight: torch.Tensor) -> Kernels:
    """Return the four kernels `[C', C, 3, 3]` that m0 to m3 convolve with, of a weight `[C', C, 3, 3, 3]`."""
    first, middle, last = weight.unbind(2)
    outer, half = (first + last) / 2, middle / 2
    return first, outer + half, outer - half, last


def convolve_pairs(
    padded_BCTHW: torch.Tensor, weight: torch.Tensor, kernels: Kernels, bias: torch.Tensor | None
) -> torch.Tensor:
    """Convolve over three frames and 3 x 3 pixels with zeros around; no gradient.

    Args:
        padded_BCTHW: `[B, C, T + 2, H, W]`, T >= 1; of an odd T the first frame is convolved plainly.
        weight: `[C', C, 3, 3, 3]`.
        kernels: `pair_kernels(weight)`, made once for all the pieces of a clip.
        bias: `[C']`.

    Returns:
        `[B, C', T, H, W]`, equal to the plain convolution to rounding.
    """
    batch, _, frames, height, width = padded_BCTHW.shape
    out_BCTHW = padded_BCTHW.new_empty(batch, len(weight), frames - 2, height, width)
    odd = frames % 2
    if odd:
        out_BCTHW[:, :, :1] = F.conv3d(padded_BCTHW[:, :, :3], weight, bias, padding=(0, 1, 1))
    if frames - 2 > odd:
        even = padded_BCTHW[:, :, odd:]
        d0, d1, d2, d3 = (even[:, :, place : frames - odd - 3 + place : 2] for place in range(4))
        early_BCTHW, late_BCTHW = out_BCTHW[:, :, odd::2], out_BCTHW[:, :, odd + 1 :: 2]
        half_BCTHW, other_BCTHW = _product(torch.add, d1, d2, kernels[1]), _product(torch.sub, d2, d1, kernels[2])
        torch.add(half_BCTHW, other_BCTHW, out=early_BCTHW)
        torch.sub(half_BCTHW, other_BCTHW, out=late_BCTHW)
        del half_BCTHW, other_BCTHW  # else they would live on beside the next ones
        early_BCTHW += _product(torch.sub, d0, d2, kernels[0], bias)
        late_BCTHW -= _product(torch.sub, d1, d3, kernels[3], None if bias is None else -bias)
    return out_BCTHW


def _product(
    combine: Callable[..., torch.Tensor],
    a_BCTHW: torch.Tensor,
    b_BCTHW: torch.Tensor,
    kernel: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Convolve every frame of `combine(a, b)` with one kernel."""
    batch, channels, frames, height, width = a_BCTHW.shape
    sums_BTCHW = a_BCTHW.new_empty(batch, frames, channels, height, width)
    combine(a_BCTHW, b_BCTHW, out=sums_BTCHW.transpose(1, 2))
    product = F.conv2d(sums_BTCHW.flatten(0, 1), kernel, bias, padding=1)
    return product.unflatten(0, (batch, frames)).transpose(1, 2)
