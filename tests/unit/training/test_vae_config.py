"""A VAE's layouts that work, and what is said of the others."""

import pytest

from megacogvx.config import build_config
from megacogvx.errors import ConfigError
from megacogvx.training.vae_config import VAETrainConfig


def test_vae_has_no_rings():
    with pytest.raises(ConfigError, match="ring_size=2: the VAE has no keys and values"):
        vae_config(context_parallel_size=2, ring_size=2).validate_layout(2)


def test_vae_has_no_stages():
    values = {"clips": {"paths": ["c"]}, "parallel": {"pipeline_parallel_size": 2}}
    with pytest.raises(ConfigError, match="pipeline_parallel_size=2"):
        build_config(VAETrainConfig, values).validate_layout(2)


def vae_config(frames=17, clips_per_step=4, **parallel) -> VAETrainConfig:
    clips = {"paths": ["c"], "frames": frames, "clips_per_step": clips_per_step}
    return build_config(VAETrainConfig, {"clips": clips, "parallel": parallel})


@pytest.mark.parametrize(("frames", "context", "world"), [(17, 2, 2), (17, 5, 5), (9, 3, 6), (9, 2, 8), (1, 1, 4)])
def test_frame_splits_that_work(frames, context, world):
    vae_config(frames, context_parallel_size=context).validate_layout(world)


@pytest.mark.parametrize(
    ("frames", "context", "named"),
    [
        (17, 6, r"clips\.frames=17, parallel\.context_parallel_size=6.*that works: 25; .*for 17 frames: 5$"),
        (9, 4, r"nearest number of frames that works: 17; .*for 9 frames: 3$"),
        (13, 2, r"takes 8k \+ 1 frames .*that works: 17; .*for 9 frames: 3$"),
        (1, 2, r"that works: 9; .*for 1 frames: 1$"),
    ],
)
def test_frames_that_cannot_be_split_name_what_can(frames, context, named):
    with pytest.raises(ConfigError, match=named):
        vae_config(frames, context_parallel_size=context).validate_layout(context)


def test_the_vae_has_no_tensor_parallelism_and_clips_divide_over_replicas():
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=2.*\n.*clips_per_step=3.*2 data-par.*works: 4"):
        vae_config(clips_per_step=3, tensor_parallel_size=2).validate_layout(4)


def gan_config(size=64, **loss) -> VAETrainConfig:
    sections = {"clips": {"paths": ["c"], "height": size, "width": 64}, "training": {"steps": 10}}
    return build_config(VAETrainConfig, {**sections, "loss": {"gan_weight": 0.5, **loss}})


def test_a_gan_that_never_starts_and_clips_smaller_than_its_patches():
    gan_config(gan_start_step=9).validate_layout(1)
    with pytest.raises(ConfigError, match=r"gan_start_step=10 is never reached in training\.steps=10"):
        gan_config(gan_start_step=10).validate_layout(1)
    with pytest.raises(ConfigError, match=r"clips\.height=16 x .*discriminator\.layers=3, which take 24 x 24 pixels"):
        gan_config(size=16).validate_layout(1)
    gan_config(size=16, gan_weight=0.0, gan_start_step=10).validate_layout(1)
