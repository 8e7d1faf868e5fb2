import math

import pytest
import torch

from megacogvx import draws
from megacogvx.errors import DataError
from megacogvx.evaluation.reconstruction import flickering, psnr, ssim
from megacogvx.testing.tolerance import assert_close


def _bytes(what, frames=3, height=14, width=17):
    noise = draws.normal((frames, height, width, 3), 0, what)
    return (128 + 50 * noise).clamp(0, 255).to(torch.uint8)


def _floats(video_THWC):
    return video_THWC.movedim(-1, -4).float() / 127.5 - 1.0


def test_psnr_of_a_known_error():
    video = torch.full((2, 8, 8, 3), 100, dtype=torch.uint8)
    other = video.clone()
    other[0, ..., 0] += 30  # one frame of two, one colour of three: a mean squared error of 150 over the clip
    assert psnr(video, other).item() == pytest.approx(10 * math.log10(255**2 / 150))
    assert psnr(video, video).item() == math.inf


def test_ssim_equals_its_definition_at_every_window():
    a, b = _bytes("a"), _bytes("b")
    place = torch.arange(11, dtype=torch.float64) - 5
    window = torch.exp(-(place[:, None] ** 2 + place[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for t in range(3):
        for c in range(3):
            for row in range(14 - 10):
                for column in range(17 - 10):
                    x, y = (v[t, row : row + 11, column : column + 11, c].double() for v in (a, b))
                    mx, my = (window * x).sum(), (window * y).sum()
                    vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
                    cov = (window * (x - mx) * (y - my)).sum()
                    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
                    values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    assert_close(ssim(a, b), torch.stack(values).mean(), 1e-9)
    assert ssim(a, a).item() == pytest.approx(1.0, abs=1e-12)


def test_flickering_is_the_mean_difference_of_neighbours_in_grey_levels():
    video = torch.zeros(3, 4, 4, 3, dtype=torch.uint8)
    video[1] = 30
    video[2] = 20
    assert flickering(video).item() == pytest.approx((30 + 10) / 2)
    assert flickering(video[:1]).item() == 0.0


def test_bytes_and_floats_measure_the_same():
    a, b = _bytes("a"), _bytes("b")
    for measure in (psnr, ssim):
        assert_close(measure(_floats(a), _floats(b)), measure(a, b), 1e-6)
        assert_close(measure(a, _floats(b)), measure(a, b), 1e-6)
    assert_close(flickering(_floats(a)), flickering(a), 1e-6)


def test_floats_beyond_the_range_are_clamped():
    video = torch.full((3, 2, 12, 12), 1.0)
    assert psnr(video, 1.5 * video).item() == math.inf


def test_one_number_for_each_clip_of_a_batch():
    clips, others = torch.stack([_bytes("a"), _bytes("b")]), torch.stack([_bytes("c"), _bytes("d")])
    for measure in (psnr, ssim):
        expected = torch.stack([measure(clips[i], others[i]) for i in range(2)])
        assert_close(measure(clips, others), expected, 1e-12)
        assert expected.dtype == torch.float64
    assert flickering(clips).shape == (2,)
    assert flickering(clips)[1] == flickering(clips[1])


def test_constant_videos_give_no_nan():
    black = torch.zeros(2, 12, 12, 3, dtype=torch.uint8)
    assert ssim(black, black).item() == 1.0
    assert flickering(black).item() == 0.0
    assert math.isfinite(ssim(black, black + 255).item())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: psnr(_bytes("a"), _bytes("b", frames=2)), r"\[3, 3, 14, 17\] and \[3, 2, 14, 17\]"),
        (lambda: ssim(_bytes("a", height=9), _bytes("b", height=9)), "9 x 17.*11 x 11"),
        (lambda: flickering(torch.zeros(3, 4, 4, dtype=torch.uint8)), r"not \[3, 4, 4\]"),
        (lambda: flickering(torch.zeros(1, 4, 4, 3, dtype=torch.int64)), "not torch.int64"),
    ],
)
def test_what_is_no_video_is_a_data_error(call, message):
    with pytest.raises(DataError, match=message):
        call()
