"""The 3D causal VAE: pixels to latents and back (CogVideoX paper, section 2.1)."""

from megacogvx.models.vae.config import PRESETS, VAEConfig
from megacogvx.models.vae.initialize import initialize_weights
from megacogvx.models.vae.losses import VAELoss, VAELossConfig, VAELosses
from megacogvx.models.vae.model import CogVideoXVAE, Reconstruction
from megacogvx.models.vae.tiling import CHUNKED, TILED, WHOLE, Coding, Tile

__all__ = [
    "CHUNKED",
    "PRESETS",
    "TILED",
    "WHOLE",
    "Coding",
    "CogVideoXVAE",
    "Reconstruction",
    "Tile",
    "VAEConfig",
    "VAELoss",
    "VAELossConfig",
    "VAELosses",
    "initialize_weights",
]
