import pytest

from megacogvx.models.transformer.config import CogVideoXConfig
from megacogvx.models.transformer.rope import crop_region, place_on_rope_grid, rope_origin_and_step
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
