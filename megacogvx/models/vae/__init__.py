"""The 3D causal VAE: pixels to latents and back (CogVideoX paper, section 2.1)."""

from megacogvx.models.vae.config import PRESETS, VAEConfig
from megacogvx.models.vae.initialize import initialize_weights
from megacogvx.models.vae.losses import VAELoss, VAELossConfig, VAELosses
from megacogvx.models.vae.model import CogVideoXVAE, Reconstruction

__all__ = [
    "PRESETS",
    "CogVideoXVAE",
    "Reconstruction",
    "VAEConfig",
    "VAELoss",
    "VAELossConfig",
    "VAELosses",
    "initialize_weights",
]
