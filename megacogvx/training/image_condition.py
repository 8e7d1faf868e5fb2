"""Image to video in training: the first frame of each sample, noised in pixel space and encoded by the frozen VAE.

The noise is there so that the model doesn't lean on a perfect image (CogVideoX paper, section 3.3 and appendix D);
it goes on the pixels, so the VAE has to run at each step. Everything is drawn from (seed, what, step, sample id) and
every image is encoded by itself, so its latents are the same on each rank that needs them and on every layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field

from megacogvx import draws
from megacogvx.config import Section
from megacogvx.data.indexed.encoder_info import EncoderInfo
from megacogvx.data.transforms import to_model_range
from megacogvx.diffusion.image_condition import ImageLatentScale, noised_image, scaled_image_latents
from megacogvx.errors import ConfigError
from megacogvx.inference.load import VAECheckpoint, load_vae
from megacogvx.models.vae import gaussian
from megacogvx.models.vae.model import CogVideoXVAE
from megacogvx.models.weights import weights_fingerprint

UNKNOWN = "unknown"  # fingerprint of an encoder that wasn't at hand
DIVIDING_PRESETS = ("cogvideox1_5_5b_i2v",)  # whose released pipelines divide image latents by the scaling factor


class ImageConfig(Section):
    """Section `image`: what the first frames of an image-to-video training become.

    Attributes:
        vae: run folder or checkpoint of the VAE that encoded the dataset.
        noise_log_mean, noise_log_deviation: the pixels, in [-1, 1], get noise of sigma = exp(N(mean, deviation)).
        dropout: probability that a sample sees no image (zeros).
        latent_scale: whether image latents are multiplied by the scaling factor or divided by it; None: as the weights
            of `model.preset` were released (divided in 1.5, multiplied otherwise).
    """

    vae: Path | None = None
    noise_log_mean: float = Field(-3.0, allow_inf_nan=False)
    noise_log_deviation: float = Field(0.5, ge=0, allow_inf_nan=False)
    dropout: float = Field(0.05, ge=0, le=1)
    latent_scale: ImageLatentScale | None = None

    def scale_for(self, preset: str | None) -> ImageLatentScale:
        """Return how image latents are scaled for a model of `preset`."""
        return self.latent_scale or ("divide" if preset in DIVIDING_PRESETS else "multiply")


@dataclass(frozen=True)
class ImageLatents:
    """Makes image latents of first frames.

    Attributes:
        vae: frozen; its encoder alone is used.
        config: section `image`.
        scaling_factor: of the video's latents.
        scale: how the image's take part in it.
        seed: of all draws.
    """

    vae: CogVideoXVAE
    config: ImageConfig
    scaling_factor: float
    scale: ImageLatentScale
    seed: int

    @torch.no_grad()
    def __call__(self, image_HW3: torch.Tensor, step: int, sample_id: int) -> torch.Tensor:
        """Return the latents `[C, h, w]` fp32 on the CPU of one first frame (uint8 pixels) at this step."""
        pixels_3HW = to_model_range(image_HW3[None])[:, 0]
        noise_3HW = draws.normal(tuple(pixels_3HW.shape), self.seed, "image noise", step, sample_id)
        noisy_3HW = noised_image(pixels_3HW, noise_3HW, self.sigma(step, sample_id))
        parameter = next(self.vae.encoder.parameters())
        moments_B2CTHW = self.vae.encode(noisy_3HW[None, :, None].to(parameter.device, parameter.dtype))
        moments_2CHW = moments_B2CTHW[0, :, 0].float().cpu()
        shape = (moments_2CHW.shape[0] // 2, *moments_2CHW.shape[1:])
        posterior_CHW = draws.normal(shape, self.seed, "image posterior", step, sample_id)
        latents_1CHW = gaussian.sample(moments_2CHW[None], posterior_CHW[None])
        return scaled_image_latents(latents_1CHW[0], self.scaling_factor, self.scale)

    def sigma(self, step: int, sample_id: int) -> float:
        """Return the noise level of a sample's first frame: exp(N(mean, deviation))."""
        drawn = float(draws.normal((1,), self.seed, "image noise level", step, sample_id))
        return math.exp(self.config.noise_log_mean + self.config.noise_log_deviation * drawn)

    def drops(self, step: int, sample_id: int) -> bool:
        """Return whether this sample sees no image at this step."""
        return draws.uniform(self.seed, "image dropout", step, sample_id) < self.config.dropout


def check_vae(key: str, path: Path, encoder: EncoderInfo) -> VAECheckpoint:
    """Return the VAE that the config's `key` names, its weights not read yet.

    Raises:
        CheckpointError: it is no complete checkpoint of a VAE.
        ConfigError: its latents have another number of channels than the dataset's.
    """
    found = VAECheckpoint.find(path)
    if found.config.latent_channels != encoder.latent_channels:
        raise ConfigError(
            f"{key}={path} has latent_channels={found.config.latent_channels}, the dataset was encoded with "
            f"{encoder.latent_channels}; name the VAE that encoded it"
        )
    return found


def load_image_vae(path: Path, encoder: EncoderInfo, device: torch.device, dtype: torch.dtype) -> CogVideoXVAE:
    """Load the VAE without its decoder, and check that it is the one that encoded the dataset.

    Raises:
        ConfigError: the dataset names another VAE's weights.
    """
    vae = load_vae(path, torch.device("cpu"), torch.float32)
    made_by = {weights_fingerprint(vae), weights_fingerprint(vae.to(torch.bfloat16)), UNKNOWN}
    if encoder.vae_fingerprint not in made_by:
        raise ConfigError(
            f"image.vae={path} is not the VAE that encoded the dataset (fingerprint {encoder.vae_fingerprint}); name "
            "that one, or the image's latents would mean something else than the video's"
        )
    vae = load_vae(path, device, dtype)
    del vae.decoder
    return vae
