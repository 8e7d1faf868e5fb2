"""First frames: noised in pixel space, encoded by the frozen VAE, beside the noisy latents at the first frame alone."""

import math
from dataclasses import dataclass, replace
from statistics import fmean, pstdev

import pytest
import torch

from megacogvx import draws
from megacogvx.data.indexed.encoder_info import EncoderInfo
from megacogvx.data.pack import Pack
from megacogvx.diffusion.config import DiffusionConfig
from megacogvx.diffusion.schedule import NoiseSchedule
from megacogvx.errors import ConfigError
from megacogvx.models.vae.model import CogVideoXVAE
from megacogvx.models.weights import weights_fingerprint
from megacogvx.pack_layout import build_layout, place_sample
from megacogvx.testing.drawn_checkpoint import SMALL_VAE, Drawn
from megacogvx.testing.tiny_conditions import write_vae
from megacogvx.testing.tiny_dataset import tiny_encoder, tiny_image
from megacogvx.training.batch import BatchMaker
from megacogvx.training.image_condition import ImageConfig, ImageLatents, check_vae, load_image_vae

CHANNELS, WIDTH, SCALE, SEED, STEP = 4, 6, 0.7, 5, 9
SHAPES = [(11, 3, 4, 6, 5), (22, 1, 6, 4, 3), (33, 5, 4, 4, 7)]  # id, T, H, W, text
LAYOUTS = [(2, 1), (1, 2), (2, 2), (3, 2)]  # tensor, context


@dataclass
class Ranks:
    """Stands for ParallelGroups: a batch asks for places and a device alone."""

    tensor: tuple[int, int]
    context: tuple[int, int]
    device: str = "cpu"


@pytest.fixture(scope="module")
def vae():
    from megacogvx.conversion.settings import VAESettings

    model, drawn = CogVideoXVAE(SMALL_VAE).requires_grad_(False), Drawn(VAESettings(SMALL_VAE))
    model.load_state_dict({name: drawn.read(name) for name in model.state_dict()})
    return model


def pack(q):
    patch = (q, 2, 2)
    layout = build_layout([place_sample(*shape, patch) for shape in SHAPES], patch, multiple=24)
    latents = [draws.normal((t, h, w, 2 * CHANNELS), 0, "x", number).bfloat16() for number, t, h, w, _ in SHAPES]
    text = [draws.normal((length, WIDTH), 0, "text", number).bfloat16() for number, *_, length in SHAPES]
    images = tuple(tiny_image(number, (t, h, w)) for number, t, h, w, _ in SHAPES)
    return Pack(layout, latents, text, step=STEP, place=0, images=images)


def images(vae, scale="multiply", **config):
    return ImageLatents(vae, ImageConfig(**{"dropout": 0.0, **config}), SCALE, scale, SEED)


def prepare(q, image_latents, tensor=(0, 1), context=(0, 1), one=None):
    config = DiffusionConfig()
    groups = Ranks(tensor, context)
    maker = BatchMaker(config, NoiseSchedule(config), SCALE, SEED, groups, torch.float32, images=image_latents)
    return maker.prepare(one or pack(q), [100, 500, 999])


def channels(batch, q, sample):
    """Rows of a sample as `[t, h * w, 2C, q, p * p]`."""
    start = sum(s.video_length for s in batch.layout.samples[:sample])
    grid = batch.layout.samples[sample].grid
    rows = batch.video_SP[start : start + batch.layout.samples[sample].video_length]
    return rows.reshape(grid[0], grid[1] * grid[2], 2 * CHANNELS, q, 4)


@pytest.mark.parametrize("q", [1, 2])
def test_the_image_stands_at_the_first_frame_after_the_noisy_channels_and_zeros_elsewhere(vae, q):
    with_images, without = prepare(q, images(vae)), prepare(q, None)
    for sample in range(3):
        rows = channels(with_images, q, sample)
        noisy, image = rows[:, :, :CHANNELS], rows[:, :, CHANNELS:]
        start = sum(s.video_length for s in without.layout.samples[:sample])
        plain = without.video_SP[start : start + noisy.shape[0] * noisy.shape[1]]
        assert torch.equal(noisy.reshape(len(plain), -1), plain), "the noisy latents are what they are without an image"
        assert image[0, :, :, 0].abs().min() > 0, "with a temporal patch the first of the repeated frames has it"
        assert not image[1:].any() and not image[0, :, :, 1:].any()
    assert torch.equal(with_images.target_SP, without.target_SP)


@pytest.mark.parametrize("scale", ["multiply", "divide"])
def test_latents_are_those_of_the_noised_pixels(vae, scale):
    maker = images(vae, scale)
    sample_id, shape = 11, (3, 32, 48)
    sigma = math.exp(-3.0 + 0.5 * float(draws.normal((1,), SEED, "image noise level", STEP, sample_id)))
    noise = draws.normal(shape, SEED, "image noise", STEP, sample_id)
    pixels = tiny_image(sample_id, (3, 4, 6)).permute(2, 0, 1).float() / 127.5 - 1 + sigma * noise
    mean, log_variance = vae.encode(pixels[None, :, None])[0, :, 0].chunk(2)
    posterior = draws.normal((CHANNELS, 4, 6), SEED, "image posterior", STEP, sample_id)
    latents = mean + (0.5 * log_variance.clamp(-30, 20)).exp() * posterior
    expected = latents * SCALE if scale == "multiply" else latents / SCALE
    found = maker(tiny_image(sample_id, (3, 4, 6)), STEP, sample_id)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, maker(tiny_image(sample_id, (3, 4, 6)), STEP + 1, sample_id), atol=1e-3)


@pytest.mark.parametrize("q", [1, 2])
@pytest.mark.parametrize(("tensor", "context"), LAYOUTS)
def test_rows_of_all_ranks_are_the_rows_of_one(vae, q, tensor, context):
    whole = prepare(q, images(vae))
    parts = [prepare(q, images(vae), (t, tensor), (c, context)) for c in range(context) for t in range(tensor)]
    assert torch.equal(torch.cat([part.video_SP for part in parts]), whole.video_SP)


def test_a_rank_asks_for_the_images_whose_first_frame_it_holds_and_no_others(vae):
    asked = []

    class Counting(ImageLatents):
        def __call__(self, image_HW3, step, sample_id):
            asked.append(sample_id)
            return super().__call__(image_HW3, step, sample_id)

    prepare(1, Counting(**vars(images(vae))), context=(1, 2))
    assert asked == [22, 33][-len(asked) :] and 11 not in asked


def test_images_are_dropped_at_their_rate_and_leave_zeros(vae):
    half = images(vae, dropout=0.25)
    over_steps = fmean(half.drops(step, 7) for step in range(2000))
    over_samples = fmean(half.drops(7, sample) for sample in range(2000))
    assert max(abs(over_steps - 0.25), abs(over_samples - 0.25)) < 4 * (0.25 * 0.75 / 2000) ** 0.5
    batch = prepare(1, images(vae, dropout=1.0))
    assert not any(channels(batch, 1, sample)[:, :, CHANNELS:].any() for sample in range(3))
    bad = pack(1).without([1])
    batch = prepare(1, images(vae), one=bad)
    assert not channels(batch, 1, 1)[:, :, CHANNELS:].any() and channels(batch, 1, 0)[0, :, CHANNELS:].any()


def test_noise_levels_are_log_normal(vae):
    maker = images(vae)
    logs = [math.log(maker.sigma(step, 3)) for step in range(2000)]
    assert abs(fmean(logs) + 3.0) < 4 * 0.5 / 2000**0.5 and abs(pstdev(logs) - 0.5) < 0.04


def test_the_released_weights_scale_is_taken_by_preset():
    assert ImageConfig().scale_for("cogvideox1_5_5b_i2v") == "divide"
    assert ImageConfig().scale_for("cogvideox_5b_i2v") == ImageConfig().scale_for(None) == "multiply"
    assert ImageConfig(latent_scale="multiply").scale_for("cogvideox1_5_5b_i2v") == "multiply"


def test_another_vae_than_the_datasets_is_refused(tmp_path, vae):
    path, device = write_vae(tmp_path), torch.device("cpu")

    def encoder(**changes) -> EncoderInfo:
        return tiny_encoder(first_frame=True, **{"vae_fingerprint": weights_fingerprint(vae), **changes})

    check_vae("image.vae", path, encoder())
    loaded = load_image_vae(path, encoder(), device, torch.float32)
    assert not hasattr(loaded, "decoder"), "it is not needed, and more than half of the weights"
    assert torch.equal(images(loaded)(tiny_image(1, (1, 4, 4)), 0, 1), images(vae)(tiny_image(1, (1, 4, 4)), 0, 1))
    with pytest.raises(ConfigError, match="is not the VAE that encoded the dataset"):
        load_image_vae(path, encoder(vae_fingerprint="other"), device, torch.float32)
    with pytest.raises(ConfigError, match=r"latent_channels=4, the dataset was encoded with 5"):
        check_vae("image.vae", path, encoder(latent_channels=5))
    bf16 = replace(images(load_image_vae(path, encoder(), device, torch.bfloat16)))
    assert bf16(tiny_image(1, (1, 4, 4)), 0, 1).dtype == torch.float32
