"""Which sizes of a video are accepted, and what is said of the others."""

import pytest

from megacogvx.errors import ConfigError
from megacogvx.inference.video_size import VideoSize
from megacogvx.models.vae.config import VAEConfig


def test_sizes_that_work():
    for size in ((1, 16, 16), (9, 480, 720), (17, 64, 144), (49, 480, 720)):
        VideoSize(*size).check(VAEConfig(), 2)
    VideoSize(5, 24, 40).check(VAEConfig(temporal_compression_ratio=1), 1)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (
            (16, 480, 720),
            r"--frames 16 must be 8k \+ 1 \(4 latent frames would give 16 frames, the first of which "
            r"doesn't stand alone as it does in training\); nearest: 9, 17",
        ),
        ((13, 480, 720), r"--frames 13 must be 8k \+ 1 \(4 latent frames would give 16 frames, .*nearest: 9, 17"),
        ((3, 480, 720), r"--frames 3 must be 8k \+ 1 \(1 latent frames would give 1 frames\); nearest: 1, 9"),
        ((0, 480, 720), r"--frames 0 must be 8k \+ 1; nearest: 1, 9"),
        ((49, 470, 720), r"--height 470 must be a multiple of 16 pixels; nearest: 464, 480"),
        ((49, 480, 8), r"--width 8 must be a multiple of 16 pixels; nearest: 16"),
    ],
)
def test_sizes_that_do_not_work_are_named_with_the_nearest(size, message):
    with pytest.raises(ConfigError, match=message):
        VideoSize(*size).check(VAEConfig(), 2)


def test_all_wrong_sizes_are_named_at_once():
    with pytest.raises(ConfigError, match=r"--frames 2 .*--height 17 .*--width 33"):
        VideoSize(2, 17, 33).check(VAEConfig(), 2)


def test_accepted_sizes_decode_to_themselves():
    """The rule agrees with the VAE: exactly the lengths that come back unchanged are accepted."""
    vae = VAEConfig()
    for frames in range(1, 60):
        returns = vae.decoded_frames(vae.latent_frames(frames)) == frames and frames % 2 == 1
        if returns:
            VideoSize(frames, 16, 16).check(vae, 2)
        else:
            with pytest.raises(ConfigError):
                VideoSize(frames, 16, 16).check(vae, 2)
