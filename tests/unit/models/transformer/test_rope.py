import pytest
import torch

from megacogvx import draws
from megacogvx.models.transformer.config import CogVideoXConfig
from megacogvx.models.transformer.rope import crop_region, place_on_rope_grid, rope_origin_and_step, rotate_in_own_dtype
from megacogvx.pack_layout import build_layout, place_sample

SLICE = CogVideoXConfig(preset="cogvideox_5b")
CROP = CogVideoXConfig(preset="cogvideox_5b", rope_grid="crop")


def _axis(grid, axis):
    origin, step = rope_origin_and_step(grid, CROP)
    return [origin[axis] + step[axis] * cell for cell in range(grid[axis])]


def test_slice_counts_from_zero_at_any_size():
    assert rope_origin_and_step((40, 48, 85), SLICE) == ((0, 0, 0), (1, 1, 1))


def test_the_native_grid_is_the_same_by_both_conventions():
    assert rope_origin_and_step((13, 30, 45), CROP) == ((0, 0, 0), (1, 1, 1))


# Published corner cases: what a grid of this size is fitted to inside 30 x 45.
@pytest.mark.parametrize(
    ("grid", "region"),
    [
        ((48, 85), ((2, 0), (27, 45))),
        ((24, 24), ((0, 8), (30, 38))),
        ((60, 90), ((0, 0), (30, 45))),
        ((30, 28), ((0, 8), (30, 36))),  # round(8.5) = 8: half to even
        ((29, 45), ((0, 0), (29, 45))),  # round(0.5) = 0
    ],
)
def test_crop_region(grid, region):
    assert crop_region(grid, (30, 45)) == region


def test_crop_scales_the_end_point_and_not_the_distance():
    rows = _axis((1, 48, 85), 1)
    assert rows[:3] == pytest.approx([2.0, 2.0 + (27 * 47 / 48 - 2) / 47, 2.0 + 2 * (27 * 47 / 48 - 2) / 47])
    assert rows[-1] == pytest.approx(27 * 47 / 48)
    assert _axis((1, 60, 90), 1)[1] == pytest.approx(0.5)


def test_one_row_or_column_stands_at_the_origin():
    assert _axis((1, 1, 1), 1) == [0.0]
    assert _axis((1, 1, 1), 2) == [8.0]  # 30 x 30 is cut out of the middle of 30 x 45: round(7.5) = 8


def test_a_pack_is_placed_sample_by_sample():
    samples = [place_sample(1, 13, 60, 90, 226, SLICE.patch), place_sample(2, 1, 96, 170, 20, SLICE.patch)]
    layout = build_layout(samples, SLICE.patch, multiple=64)
    assert place_on_rope_grid(layout, SLICE) is layout
    placed = place_on_rope_grid(layout, CROP)
    assert placed.samples[0] == layout.samples[0]
    assert placed.samples[1].origin == (0.0, 2.0, 0.0)
    assert placed.samples[2] == layout.samples[2]  # the padding
    assert placed.boundaries == layout.boundaries


def test_rotation_in_the_weights_dtype_is_the_released_training_codes():
    """Its tables of fp32 cosines and sines are cast with the model; text isn't rotated."""
    config = CogVideoXConfig(preset="tiny", attention_head_dim=16, rope_precision="weights")
    grid, text, first = (3, 4, 5), 3, 2
    layout = build_layout([place_sample(0, 3, 8, 10, text, config.patch)], config.patch)
    axes = [
        torch.arange(cells).float()[:, None] / 10000 ** (torch.arange(0, width, 2).float() / width)
        for cells, width in zip(grid, (4, 6, 6), strict=True)
    ]
    shape = (*grid, -1)
    angles = torch.cat(
        [axes[0][:, None, None].expand(shape), axes[1][:, None].expand(shape), axes[2].expand(shape)], -1
    )
    angles = torch.cat([torch.zeros(text, 8), angles.reshape(-1, 8)])[first:, None].repeat_interleave(2, -1)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    qk = tuple(draws.normal((text + 60 - first, 2, 16), 0, name).bfloat16() for name in "qk")
    for x, rotated in zip(qk, rotate_in_own_dtype(qk, layout, first, config), strict=True):
        half = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
        assert torch.equal(rotated, x * cos + half * sin) and torch.equal(rotated[0], x[0])
