"""CogVideoXVAE equals diffusers' AutoencoderKLCogVideoX with the same random weights."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from megacogvx.config import build_config
from megacogvx.conversion.published_names import diffusers_vae
from megacogvx.conversion.tensors import InMemory, translate
from megacogvx.models.vae import CHUNKED, Coding, CogVideoXVAE, Tile, VAEConfig, gaussian, initialize_weights
from megacogvx.testing.tolerance import assert_all_close, assert_close

OUTPUT_BOUND, GRADIENT_BOUND = 1e-5, 1e-4
WHOLE_CLIP = 10**6
SMALL = {"block_out_channels": (8, 16, 16, 24), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}


def published(state: dict, config: VAEConfig) -> dict:
    """Our tensors, weights or gradients, under diffusers' names."""
    return dict(translate(InMemory(state), diffusers_vae(config)))


def pair(chunked: bool = False, **settings) -> tuple[CogVideoXVAE, AutoencoderKLCogVideoX]:
    """Our model and diffusers' with the same weights, norms and biases random too."""
    config = build_config(VAEConfig, {**SMALL, **settings})
    ours = CogVideoXVAE(config)
    initialize_weights(ours, seed=3)
    generator = torch.Generator().manual_seed(5)
    for parameter in ours.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    stages = len(config.block_out_channels)
    theirs = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * stages,
        up_block_types=("CogVideoXUpBlock3D",) * stages,
        block_out_channels=config.block_out_channels,
        latent_channels=config.latent_channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups,
        temporal_compression_ratio=config.temporal_compression_ratio,
    )
    theirs.load_state_dict(published(ours.state_dict(), config))
    if not chunked:
        theirs.num_sample_frames_batch_size = theirs.num_latent_frames_batch_size = WHOLE_CLIP
    return ours, theirs


def video(frames: int, height: int = 16, width: int = 24, batch: int = 2) -> torch.Tensor:
    """A moving picture with structure in time, so that frames differ and neighbours resemble each other."""
    generator = torch.Generator().manual_seed(frames)
    still = torch.randn(batch, 3, 1, height, width, generator=generator)
    steps = 0.3 * torch.randn(batch, 3, frames, height, width, generator=generator)
    return (still + steps.cumsum(2)).tanh()


@pytest.mark.parametrize("frames", [*range(1, 18), 25, 49])
def test_whole_clip_equals_diffusers(frames: int) -> None:
    ours, theirs = pair()
    clip = video(frames)
    with torch.no_grad():
        moments, expected = ours.encode(clip), theirs._encode(clip)
        assert_close(moments, expected, OUTPUT_BOUND, "moments")
        latents = gaussian.mode(expected)
        assert_close(ours.decode(latents), theirs.decode(latents).sample, OUTPUT_BOUND, "pixels")


def test_chunks_of_one_latent_frame_equal_diffusers() -> None:
    """The halo of a convolution then reaches back over several chunks."""
    ours, theirs = pair(chunked=True)
    theirs.num_sample_frames_batch_size = 4
    with torch.no_grad():
        for frames in (9, 12):
            moments = ours.encode(video(frames), Coding(latents_per_chunk=1))
            assert_close(moments, theirs._encode(video(frames)), OUTPUT_BOUND, f"moments of {frames} frames")


def others_slow(*frames: int) -> list:
    """Every count of frames from 1 to 17, and 49; those that aren't named are for the slow tests."""
    return [n if n in frames else pytest.param(n, marks=pytest.mark.slow) for n in (*range(1, 18), 22, 25, 33, 49)]


@pytest.mark.parametrize("frames", others_slow(1, 4, 8, 9, 12, 16, 17, 22, 25, 49))
def test_chunks_equal_the_published_default(frames: int) -> None:
    ours, theirs = pair(chunked=True)
    clip = video(frames)
    with torch.no_grad():
        moments, expected = ours.encode(clip, CHUNKED), theirs._encode(clip)
        assert_close(moments, expected, OUTPUT_BOUND, "moments")
        latents = gaussian.mode(expected)
        assert_close(ours.decode(latents, CHUNKED), theirs.decode(latents).sample, OUTPUT_BOUND, "pixels")


PUBLISHED = (48, 40, 1 / 6, 1 / 5)


@pytest.mark.parametrize(
    ("frames", "latents_per_chunk", "height", "width", "tile"),
    [
        (5, None, 80, 40, PUBLISHED),
        (17, 2, 40, 24, (32, 16, 1 / 4, 1 / 2)),
        pytest.param(17, 2, 80, 72, PUBLISHED, marks=pytest.mark.slow),
        # As high as a tile, which still starts a second row of tiles.
        pytest.param(9, None, 48, 96, PUBLISHED, marks=pytest.mark.slow),
        # Three tiles show one place, and the last are narrower than the blend.
        pytest.param(17, 2, 56, 64, (32, 32, 1 / 2, 1 / 4), marks=pytest.mark.slow),
    ],
)
def test_tiles_equal_the_published_ones(
    frames: int, latents_per_chunk: int | None, height: int, width: int, tile: tuple
) -> None:
    ours, theirs = pair(chunked=latents_per_chunk is not None)
    theirs.enable_tiling(*tile)
    clip, coding = video(frames, height, width, batch=1), Coding(latents_per_chunk, Tile(*tile))
    with torch.no_grad():
        moments, expected = ours.encode(clip, coding), theirs._encode(clip)
        assert_close(moments, expected, OUTPUT_BOUND, "moments")
        latents = gaussian.mode(expected)
        assert_close(ours.decode(latents, coding), theirs.decode(latents).sample, OUTPUT_BOUND, "pixels")


@pytest.mark.parametrize("frames", others_slow(1, 9, 12, 17))
def test_gradients_equal_diffusers(frames: int) -> None:
    ours, theirs = pair()
    clip, expected_clip = video(frames).requires_grad_(), video(frames).requires_grad_()
    noise = torch.randn(2, *ours.config.latent_shape(frames, 16, 24), generator=torch.Generator().manual_seed(1))

    moments = ours.encode(clip)
    pixels = ours.decode(gaussian.sample(moments, noise))
    (pixels.square().mean() + 0.1 * gaussian.kl(moments).mean()).backward()

    posterior = theirs.encode(expected_clip).latent_dist
    expected = theirs.decode(posterior.mean + posterior.std * noise).sample
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar)
    (expected.square().mean() + 0.1 * kl.mean()).backward()

    assert_close(pixels, expected, OUTPUT_BOUND, "pixels")
    actual = published({name: parameter.grad for name, parameter in ours.named_parameters()}, ours.config)
    reference = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert_all_close(actual, reference, GRADIENT_BOUND)
    assert_close(clip.grad, expected_clip.grad, GRADIENT_BOUND, "video")


@pytest.mark.parametrize(
    "settings",
    [
        {"temporal_compression_ratio": 1},
        {"temporal_compression_ratio": 2},
        {"temporal_compression_ratio": 8},
        {"temporal_compression_ratio": 8, "block_out_channels": (8, 8, 16, 16, 24)},
        {"layers_per_block": 2, "norm_num_groups": 8},
    ],
    ids=lambda settings: "-".join(f"{value}" for value in settings.values()),
)
@pytest.mark.parametrize("frames", [1, 16, 17])
def test_other_compressions_equal_diffusers(settings: dict, frames: int) -> None:
    ours, theirs = pair(**settings)
    clip = video(frames, height=32, width=16, batch=1)
    with torch.no_grad():
        moments, expected = ours.encode(clip), theirs._encode(clip)
        assert_close(moments, expected, OUTPUT_BOUND, "moments")
        latents = gaussian.mode(expected)
        assert_close(ours.decode(latents), theirs.decode(latents).sample, OUTPUT_BOUND, "pixels")


def test_frames_by_themselves_equal_diffusers_on_single_frames() -> None:
    """A 2D model is the 3D one on one frame, whose repeats see the kernel's sum over time."""
    config = build_config(VAEConfig, {**SMALL, "temporal_compression_ratio": 1, "temporal_kernel_size": 1})
    flat = CogVideoXVAE(config)
    initialize_weights(flat, seed=3)
    _, theirs = pair(temporal_compression_ratio=1)
    weights = published(flat.state_dict(), config)
    for name, value in theirs.state_dict().items():
        if weights[name].shape != value.shape:
            weights[name] = torch.cat([0.25 * weights[name], -0.5 * weights[name], 1.25 * weights[name]], dim=2)
    theirs.load_state_dict(weights)
    clip = video(3)
    with torch.no_grad():
        moments = flat.encode(clip)
        frames = [theirs._encode(clip[:, :, t : t + 1]) for t in range(3)]
        assert_close(moments, torch.cat(frames, dim=2), OUTPUT_BOUND, "moments")
        latents = gaussian.mode(moments)
        pixels = [theirs.decode(latents[:, :, t : t + 1]).sample for t in range(3)]
        assert_close(flat.decode(latents), torch.cat(pixels, dim=2), OUTPUT_BOUND, "pixels")
        assert_close(flat.decode(latents, CHUNKED), torch.cat(pixels, dim=2), OUTPUT_BOUND, "chunked")


def test_released_size_has_the_published_parameters() -> None:
    with torch.device("meta"):
        ours = CogVideoXVAE(VAEConfig())
        theirs = AutoencoderKLCogVideoX()
    count = {part: sum(p.numel() for p in getattr(ours, part).parameters()) for part in ("encoder", "decoder")}
    assert count == {"encoder": 92_215_456, "decoder": 123_368_451}
    assert sum(count.values()) == 215_583_907
    shapes = {name: value.shape for name, value in published(ours.state_dict(), VAEConfig()).items()}
    assert shapes == {name: value.shape for name, value in theirs.state_dict().items()}
