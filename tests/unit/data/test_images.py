from pathlib import Path

import pytest
import torch
from PIL import Image

from megacogvx.data.images import read_image, write_png
from megacogvx.errors import DataError


def test_a_png_comes_back_bit_for_bit(tmp_path: Path) -> None:
    image = torch.randint(0, 256, (17, 33, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    write_png(tmp_path / "image.png", image)
    assert torch.equal(read_image(tmp_path / "image.png"), image)
    assert [path.name for path in tmp_path.iterdir()] == ["image.png"]


def test_other_formats_and_modes_are_read_as_rgb(tmp_path: Path) -> None:
    for mode, name in (("RGB", "a.jpg"), ("RGBA", "b.png"), ("L", "c.png"), ("RGB", "d.webp")):
        Image.new(mode, (32, 16), 128 if mode == "L" else (128, 128, 128, 255)[: len(mode)]).save(tmp_path / name)
        image = read_image(tmp_path / name)
        assert image.shape == (16, 32, 3) and (image.int() - 128).abs().max() <= 2, name


def test_missing_and_damaged_images_are_data_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.png does not exist"):
        read_image(tmp_path / "absent.png")
    write_png(tmp_path / "image.png", torch.zeros(64, 64, 3, dtype=torch.uint8))
    (tmp_path / "image.png").write_bytes((tmp_path / "image.png").read_bytes()[:40])
    with pytest.raises(DataError, match=r"image\.png"):
        read_image(tmp_path / "image.png")
