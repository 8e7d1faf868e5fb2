import pytest
import torch
from PIL import Image

from megacogvx import draws
from megacogvx.data.images import write_png
from megacogvx.data.video import write_video
from megacogvx.errors import DataError
from megacogvx.inference.conditions import ConditionEncoder, check_start, read_first_frame, read_start
from megacogvx.models.vae.config import VAEConfig
from megacogvx.models.vae.initialize import initialize_weights
from megacogvx.models.vae.model import CogVideoXVAE
from megacogvx.models.vae.tiling import CHUNKED, WHOLE
from megacogvx.testing.tolerance import assert_close


@pytest.fixture(scope="module")
def vae():
    model = CogVideoXVAE(VAEConfig(preset="tiny", latent_channels=4))
    initialize_weights(model, 1)
    return model.eval()


def pixels(*shape):
    return draws.normal(shape, 0, "pixels").clamp(-1, 1)


def test_an_image_is_drawn_from_its_posterior_and_scaled(vae):
    image = pixels(3, 16, 24)
    times, divided = (ConditionEncoder(vae, 0.5, scale).image(image, 7, 2) for scale in ("multiply", "divide"))
    assert times.shape == (4, 2, 3)
    assert_close(divided, 4 * times, 1e-6)
    with torch.no_grad():
        mean, log_variance = vae.encode(image[None, :, None])[0, :, 0].chunk(2)
    noise = draws.normal((4, 2, 3), 7, "sampling image posterior", 2, 0)
    assert_close(times, 0.5 * (mean + (log_variance / 2).exp() * noise), 1e-6)
    other = ConditionEncoder(vae, 0.5).image(image, 7, 3)
    assert not torch.allclose(times, other), "another place draws another noise"


def test_noise_on_an_image_goes_on_its_pixels(vae):
    image = pixels(3, 16, 24)
    noisy = image + 0.3 * draws.normal((3, 16, 24), 7, "sampling image noise", 0)
    expected = ConditionEncoder(vae, 1.0).image(noisy, 7)
    assert_close(ConditionEncoder(vae, 1.0, image_noise=0.3).image(image, 7), expected, 1e-6)


def test_a_video_is_coded_as_asked(vae):
    video = pixels(3, 17, 16, 24)
    whole, chunked = (ConditionEncoder(vae, 0.5, coding=coding).video(video, 7) for coding in (WHOLE, CHUNKED))
    assert whole.shape == (5, 4, 2, 3)
    assert (whole - chunked).abs().max() > 1e-3
    with torch.no_grad():
        mean, log_variance = vae.encode(video[None])[0].transpose(0, 1).chunk(2, dim=1)
    noise = draws.normal_frames(range(5), (4, 2, 3), 7, "sampling video posterior", 0)
    assert_close(whole, 0.5 * (mean + (log_variance / 2).exp() * noise), 1e-6)


def test_a_first_frame_covers_the_size_and_keeps_its_centre(tmp_path):
    """Twice as wide as asked for: the sides are cut, nothing is squeezed."""
    image = torch.zeros(32, 128, 3, dtype=torch.uint8)
    image[:, 32:96] = torch.tensor([250, 10, 10], dtype=torch.uint8)
    write_png(tmp_path / "wide.png", image)
    frame = read_first_frame(tmp_path / "wide.png", (16, 32))
    assert frame.shape == (3, 16, 32)
    assert bool((frame[0] > 0.8).all()) and bool((frame[1] < -0.8).all())


def clip(path, frames, fps=8):
    levels = torch.arange(frames, dtype=torch.uint8)[:, None, None, None] * 10
    write_video(path, levels.expand(-1, 32, 48, 3).contiguous(), fps)
    return path


def test_a_start_takes_frames_by_their_time(tmp_path):
    video = clip(tmp_path / "a.mp4", 18, fps=16)
    start = read_start(video, (32, 48), 9, fps=8)
    assert start.shape == (3, 9, 32, 48)
    levels = (start.mean(dim=(0, 2, 3)) + 1) * 127.5
    assert_close(levels, torch.arange(0, 180, 20).float(), 0.05)


def test_a_video_that_is_too_short_is_named_with_what_works(tmp_path):
    video = clip(tmp_path / "a.mp4", 20)
    check_start(video, 17, 8.0, 8)
    with pytest.raises(DataError, match=r"a.mp4 lasts 2.50 s, which is 20.0 frames at --fps 8, fewer than the 49 .*"
                       r"--frames 17 works, or --fps 19.60"):  # fmt: skip
        check_start(video, 49, 8.0, 8)


def test_unreadable_and_huge_images_are_refused_before_they_are_decoded(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match=r"text.png can't be read .* PNG, JPEG or WebP"):
        read_first_frame(tmp_path / "text.png", (16, 16))
    with pytest.raises(DataError, match="does not exist"):
        read_first_frame(tmp_path / "none.png", (16, 16))
    Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")
    with pytest.raises(DataError, match=r"huge.png has 9000 x 9000 pixels, more than 67,108,864"):
        read_first_frame(tmp_path / "huge.png", (16, 16))
    write_png(tmp_path / "cut.png", (pixels(64, 64, 3) * 127 + 128).to(torch.uint8))
    data = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"cut.png"):
        read_first_frame(tmp_path / "cut.png", (16, 16))
