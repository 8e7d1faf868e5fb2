import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megacogvx.data.transforms import crop, multiple_size, resize, resized_size, to_model_range, to_pixels
from megacogvx.errors import DataError


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@given(st.integers(16, 2000), st.integers(16, 2000), st.integers(16, 800))
def test_the_short_side_fits_and_the_aspect_ratio_stays(height: int, width: int, short_side: int) -> None:
    new_height, new_width = resized_size(height, width, short_side)
    assert min(new_height, new_width) == short_side
    assert abs(new_height * width - new_width * height) <= max(height, width)  # half a pixel of rounding


def test_wide_pixels_are_evened_out() -> None:
    assert resized_size(144, 176, 64, 128 / 117) == (64, 86)
    assert resized_size(272, 640, 64) == (64, 151)


def test_resizing_is_bicubic_and_antialiased_as_in_pillow() -> None:
    frames = noise(2, 60, 90, 3)
    resized = resize(frames, (24, 31))
    for frame, got in zip(frames, resized, strict=True):
        expected = np.asarray(Image.fromarray(frame.numpy()).resize((31, 24), Image.Resampling.BICUBIC))
        assert np.abs(got.numpy().astype(int) - expected).max() <= 1


def test_resizing_to_the_same_size_changes_nothing() -> None:
    frames = noise(1, 8, 9, 3)
    assert resize(frames, (8, 9)) is frames


def test_crop_positions() -> None:
    frames = torch.arange(6 * 20, dtype=torch.uint8).view(1, 6, 20, 1).expand(1, 6, 20, 3)
    assert crop(frames, (2, 3), (0.0, 0.0))[0, 0, 0, 0] == 0
    assert crop(frames, (2, 4))[0, 0, 0, 0] == 2 * 20 + 8
    assert crop(frames, (2, 4), (0.0, 0.25))[0, 0, 0, 0] == 4
    assert crop(frames, (2, 3), (1.0, 1.0))[0, -1, -1, 0] == 6 * 20 - 1
    assert crop(frames, (6, 20)).shape == (1, 6, 20, 3)


def test_a_crop_larger_than_the_frame_is_a_data_error() -> None:
    with pytest.raises(DataError, match="6 x 7 pixels can't be cropped to 8 x 4"):
        crop(noise(1, 6, 7, 3), (8, 4))


def test_multiple_size() -> None:
    assert multiple_size(64, 150, 16) == (64, 144)
    with pytest.raises(DataError, match="64 x 15 pixels are smaller than one multiple of 16"):
        multiple_size(64, 15, 16)


def test_the_models_range_and_back() -> None:
    frames = noise(2, 4, 5, 3)
    video = to_model_range(frames)
    assert video.shape == (3, 2, 4, 5) and video.dtype == torch.float32
    assert to_model_range(torch.tensor([[[[0, 255, 0]]]], dtype=torch.uint8)).flatten().tolist() == [-1, 1, -1]
    assert torch.equal(to_pixels(video), frames)
    assert to_pixels(torch.tensor([-3.0, 0.0, 3.0]).view(3, 1, 1, 1)).flatten().tolist() == [0, 128, 255]
