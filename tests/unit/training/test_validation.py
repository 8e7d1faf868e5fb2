"""PSNR of held-out clips, and the pictures beside the originals."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megacogvx.data.images import read_image
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.groups import initialize, shutdown
from megacogvx.training.ema import WeightAverage
from megacogvx.training.validation import SHOWN_FRAMES, HeldOutClips


class Offset(torch.nn.Module):
    """A codec that moves every pixel by `offset`; its moments have a deviation that must not be drawn from."""

    config = None  # read where frames are cut over ranks

    def __init__(self, offset: float):
        super().__init__()
        self.offset = torch.nn.Parameter(torch.tensor(offset))

    def encode(self, video):
        return torch.cat([video, torch.full_like(video, 2.0)], dim=1)

    def decode(self, latents):
        return latents + self.offset


@pytest.fixture(scope="module")
def groups():
    yield initialize(ParallelConfig(device="cpu"))
    shutdown()


def clips(*frames: int):
    videos = [torch.rand(1, 3, count, 16, 24, generator=torch.Generator().manual_seed(count)) - 0.5 for count in frames]
    return SimpleNamespace(held_out_videos=lambda: ((None, video) for video in videos))


def test_psnr_of_a_known_error_is_that_of_the_posteriors_mean(groups, tmp_path):
    held_out, told = HeldOutClips(clips(9, 5), Offset(0.2), tmp_path, groups), []
    measured = held_out.measure(0, lambda: told.append("on"))
    assert measured["psnr"] == pytest.approx(20.0, abs=1e-3)  # a tenth of the range: 20 dB
    assert told == ["on", "on"], "the watch hears of each clip"


def test_pictures_show_videos_above_their_reconstructions(groups, tmp_path):
    HeldOutClips(clips(1, 9), Offset(0.4), tmp_path, groups).measure(0)
    (picture,) = (tmp_path / "reconstructions").glob("*.png")  # none of the image
    pixels = read_image(picture).float()
    assert pixels.shape == (32, 24 * SHOWN_FRAMES, 3)
    assert (pixels[16:] - pixels[:16]).mean() == pytest.approx(0.4 * 127.5, abs=0.5)


def test_averaged_weights_are_measured_beside_the_models_own(groups, tmp_path):
    model = Offset(0.0)
    average = WeightAverage(model, 0.5, groups)
    with torch.no_grad():
        model.offset.fill_(0.2)
    average.averages["offset"].fill_(0.02)
    measured = HeldOutClips(clips(9), model, tmp_path, groups, average).measure(0)
    assert measured["psnr"] == pytest.approx(20.0, abs=1e-3) and measured["psnr_ema"] == pytest.approx(40.0, abs=1e-2)
    assert model.offset.item() == pytest.approx(0.2)


def test_no_held_out_clip_that_is_large_enough_is_no_error(groups, tmp_path):
    assert HeldOutClips(clips(), Offset(0.2), tmp_path, groups).measure(99) == {}
