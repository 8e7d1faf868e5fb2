import pytest
import torch

from megacogvx import draws
from megacogvx.diffusion.image_condition import image_channels, noised_image, scaled_image_latents
from megacogvx.patches import patchify

IMAGE = draws.normal((4, 4, 6), 0, "image")


def test_the_image_stands_at_the_first_frame_alone():
    channels = image_channels(IMAGE, range(0, 3))
    assert torch.equal(channels[0], IMAGE)
    assert channels.shape == (3, 4, 4, 6) and not channels[1:].any()


def test_with_repeated_frames_it_stands_at_the_first_repetition():
    channels = image_channels(IMAGE, range(-1, 3), repeated=1)
    assert torch.equal(channels[0], IMAGE)
    assert not channels[1:].any(), "the first real frame has none"


@pytest.mark.parametrize("repeated", [0, 1])
def test_shares_of_frames_join_to_the_whole(repeated):
    """A rank asks for its frames alone."""
    whole = image_channels(IMAGE, range(-repeated, 5), repeated)
    parts = [image_channels(IMAGE, range(a, b), repeated) for a, b in ((-repeated, 1), (1, 1), (1, 5))]
    assert torch.equal(torch.cat(parts), whole)


def test_noisy_channels_come_first_in_a_row():
    noisy = torch.ones(3, 4, 4, 6)
    rows = patchify(torch.cat([noisy, image_channels(IMAGE, range(3))], dim=1), (1, 2, 2))
    assert bool((rows[:, :16] == 1).all())
    assert torch.equal(rows[:6, 16:], patchify(IMAGE[None], (1, 2, 2)))
    assert not rows[6:, 16:].any()


def test_scale_follows_the_weights():
    assert torch.equal(scaled_image_latents(IMAGE, 0.5, "multiply"), IMAGE / 2)
    assert torch.equal(scaled_image_latents(IMAGE, 0.5, "divide"), IMAGE * 2)
    assert scaled_image_latents(IMAGE.bfloat16(), 0.5, "divide").dtype == torch.float32


def test_noise_goes_on_the_pixels():
    noise = draws.normal(IMAGE.shape, 1, "noise")
    assert torch.equal(noised_image(IMAGE, noise, 0.0), IMAGE)
    torch.testing.assert_close(noised_image(IMAGE, noise, 0.1), IMAGE + 0.1 * noise)
