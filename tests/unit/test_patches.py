"""Rows come back to the same latents."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megacogvx.patches import grid_of, patchify, repeated_frames, unpatchify

PATCHES = st.tuples(st.integers(1, 3), st.integers(1, 2)).map(lambda qp: (qp[0], qp[1], qp[1]))


@st.composite
def latents_and_patches(draw):
    """Latents `[T, C, H, W]` whose values are their own places, and a patch that fits."""
    patch = draw(PATCHES)
    frames, channels = draw(st.integers(1, 7)), draw(st.integers(1, 3))
    height, width = patch[1] * draw(st.integers(1, 4)), patch[2] * draw(st.integers(1, 4))
    return torch.arange(frames * channels * height * width).reshape(frames, channels, height, width).float(), patch


@given(latents_and_patches())
def test_unpatchify_inverts_patchify(case):
    latents, patch = case
    frames, _, height, width = latents.shape
    rows = patchify(latents, patch)
    grid = grid_of(frames, height, width, patch)
    assert rows.shape == (grid[0] * grid[1] * grid[2], latents.shape[1] * patch[0] * patch[1] * patch[2])
    assert torch.equal(unpatchify(rows, grid, patch, repeated_frames(frames, patch[0])), latents)


@given(latents_and_patches())
def test_a_row_is_one_patch_in_c_q_p_p_order(case):
    latents, (q, ph, pw) = case
    copies = repeated_frames(latents.shape[0], q)
    padded = torch.cat([latents[:1]] * copies + [latents])
    _, h, w = grid_of(latents.shape[0], latents.shape[2], latents.shape[3], (q, ph, pw))
    for place, row in enumerate(patchify(latents, (q, ph, pw))):
        t, y, x = place // (h * w), place // w % h, place % w
        cut = padded[t * q : (t + 1) * q, :, y * ph : (y + 1) * ph, x * pw : (x + 1) * pw]
        assert torch.equal(row, cut.transpose(0, 1).flatten())


@pytest.mark.parametrize(
    ("frames", "q", "copies"), [(13, 1, 0), (13, 2, 1), (12, 2, 0), (1, 3, 2), (5, 3, 1), (6, 3, 0)]
)
def test_the_first_frame_is_repeated_until_the_patch_divides_the_frames(frames, q, copies):
    assert repeated_frames(frames, q) == copies
    assert (frames + copies) % q == 0
