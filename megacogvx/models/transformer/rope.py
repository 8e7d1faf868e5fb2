"""Where a sample sits on the rotary grid: origin and step of its positions, per sample of a pack.

The rotation itself is the op `qk_norm_rope`, but for models that rotate in the weights' dtype. Both conventions are a
first position and a step along each axis (paper section 3.1), so a pack may mix resolutions:

- "slice": positions count 0, 1, 2 ... from the corner of one large grid; a model says by its native size how far.
- "crop": a video of another shape is scaled into the native grid and centred (the 1.0 inference pipelines).
"""

from __future__ import annotations

import dataclasses

import torch

from megacogvx.models.transformer.config import CogVideoXConfig
from megacogvx.pack_layout import PADDING_ID, PackLayout, PackSample
from megacogvx.patches import Triple
from megacogvx_kernels.qk_norm_rope.reference import quarter_turn, rotary_angles

Point = tuple[float, float, float]
SLICE: tuple[Point, Point] = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def place_on_rope_grid(layout: PackLayout, config: CogVideoXConfig) -> PackLayout:
    """Return `layout` with every sample's rotary origin and step by `config.rope_grid`.

    The data room lays samples out by "slice" and doesn't know the model; whoever runs a model of another convention
    passes its layouts through here first. A layout that needs no change is returned as it is.
    """
    samples = tuple(_place(sample, config) for sample in layout.samples)
    return layout if samples == layout.samples else PackLayout(samples, layout.patch)


def rope_origin_and_step(grid: Triple, config: CogVideoXConfig) -> tuple[Point, Point]:
    """Return origin and step, in tokens of the native grid, of a sample of `grid` tokens along (t, h, w)."""
    if config.rope_grid == "slice" or not config.use_rotary_positional_embeddings:
        return SLICE
    _, native_height, native_width = config.native_grid
    (top, left), (bottom, right) = crop_region(grid[1:], (native_height, native_width))
    height_step, width_step = _step(top, bottom, grid[1]), _step(left, right, grid[2])
    return (0.0, float(top), float(left)), (1.0, height_step, width_step)


def rotate_in_own_dtype(
    qk: tuple[torch.Tensor, torch.Tensor], layout: PackLayout, first_token: int, config: CogVideoXConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate normed q and k in their own dtype (`rope_precision: weights`).

    Source: the released training code, whose tables of cosines and sines become of the model's dtype with it.

    Args:
        qk: `[S, N, K]` each, consecutive tokens of a pack.
        layout: the pack.
        first_token: place in the pack of the first of the S tokens.
        config: section `model`.
    """
    device, dtype = qk[0].device, qk[0].dtype
    tokens_S = first_token + torch.arange(len(qk[0]), device=device)
    table, grid = layout.sample_table(device), layout.rope_grid(device)
    angles_S1K = rotary_angles(tokens_S, table, grid, config.rope_axes, config.rope_theta)[:, None]
    cos_S1K, sin_S1K = angles_S1K.cos().to(dtype), angles_S1K.sin().to(dtype)
    q_SNK, k_SNK = (x_SNK * cos_S1K + quarter_turn(x_SNK) * sin_S1K for x_SNK in qk)
    return q_SNK, k_SNK


def crop_region(grid: tuple[int, int], native: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Fit `grid` (h, w) into `native` (h, w), keeping its shape, and centre it.

    Returns:
        (top, left), (bottom, right) in tokens of the native grid; Python's rounding (half to even), as published.
    """
    (height, width), (native_height, native_width) = grid, native
    if height / width > native_height / native_width:
        size = native_height, round(native_height / height * width)
    else:
        size = round(native_width / width * height), native_width
    top, left = round((native_height - size[0]) / 2.0), round((native_width - size[1]) / 2.0)
    return (top, left), (top + size[0], left + size[1])


def _step(start: int, stop: int, count: int) -> float:
    """Return the step of `count` positions from `start` to `stop * (count - 1) / count`, the published end point.

    With start > 0 this isn't (stop - start) / count: the end point scales the position, not the distance.
    """
    if count == 1:
        return 1.0
    return (stop * (count - 1) / count - start) / (count - 1)


def _place(sample: PackSample, config: CogVideoXConfig) -> PackSample:
    if sample.sample_id == PADDING_ID:
        return sample
    origin, step = rope_origin_and_step(sample.grid, config)
    return dataclasses.replace(sample, origin=origin, step=step)
