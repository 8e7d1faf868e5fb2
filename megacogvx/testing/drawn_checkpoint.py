"""Checkpoints of random weights, of any size: each tensor is drawn when it is read, so none has to fit into memory.

Tiny ones of the five released variants serve the tests of conversion; a wide one of few layers measures its memory.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from megacogvx import draws
from megacogvx.conversion.megacogvx import shapes_of
from megacogvx.conversion.part import Kind, Part
from megacogvx.conversion.settings import (
    Conventions,
    Settings,
    TransformerSettings,
    VAESettings,
    encoder_info,
    published_settings,
)
from megacogvx.conversion.tensors import TensorInfo
from megacogvx.diffusion.config import DiffusionConfig
from megacogvx.models.transformer.config import CogVideoXConfig
from megacogvx.models.vae.config import VAEConfig

TEXT_LENGTH, TEXT_WIDTH = 8, 24  # tokens; E
FRAMES, HEIGHT, WIDTH = 9, 32, 48  # native size in pixels
SMALL: dict[str, Any] = {
    "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16, "text_embed_dim": TEXT_WIDTH,
    "time_embed_dim": 32, "max_text_seq_length": TEXT_LENGTH, "sample_height": HEIGHT // 8, "sample_width": WIDTH // 8,
    "sample_frames": FRAMES, "out_channels": 4,
}  # fmt: skip
ROTARY = {"use_rotary_positional_embeddings": True}
SMALL_VAE = VAEConfig(block_out_channels=(4, 8, 8, 12), latent_channels=4, layers_per_block=1, norm_num_groups=2)
VARIANTS: dict[str, dict[str, Any]] = {
    "2b": {"in_channels": 4},
    "5b": {"in_channels": 4, **ROTARY},
    "5b-i2v": {"in_channels": 8, **ROTARY, "use_learned_positional_embeddings": True},
    "1.5-5b": {"in_channels": 4, **ROTARY, "patch_size_t": 2},
    "1.5-5b-i2v": {"in_channels": 8, **ROTARY, "patch_size_t": 2, "ofs_embed_dim": 32},
}


class Drawn:
    """Tensors in our names, drawn from (seed, name), of about unit gain: a model of them makes no flat picture."""

    def __init__(self, settings: Settings, dtype: torch.dtype = torch.float32, seed: int = 5) -> None:
        self.path, self._seed = Path("drawn"), seed
        self.infos = {name: TensorInfo(shape, dtype) for name, shape in shapes_of(settings).items()}

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor."""
        shape, dtype = self.infos[name]
        is_norm_weight = "norm" in name and name.endswith("weight") and len(shape) == 1
        small = len(shape) == 1 or name == "embedding.positions"
        scale = 0.2 if small else math.prod(shape[1:]) ** -0.5
        return draws.normal(shape, self._seed, name).mul_(scale).add_(float(is_norm_weight)).to(dtype)


def drawn_part(settings: Settings, dtype: torch.dtype = torch.float32, seed: int = 5) -> Part:
    """Return random weights for these settings."""
    kind: Kind = "vae" if isinstance(settings, VAESettings) else "transformer"
    return Part(kind, "drawn", settings, Drawn(settings, dtype, seed))


def tiny_settings(variant: str, **conventions: Any) -> TransformerSettings:
    """Return the settings of a released variant in small, with its own schedule, scale and sampler."""
    released = published_settings(variant)
    model = CogVideoXConfig(**SMALL, **VARIANTS[variant])
    return TransformerSettings(
        model,
        DiffusionConfig(snr_shift=released.diffusion.snr_shift, scaling_factor=released.scaling_factor),
        encoder_info(model, released.scaling_factor, TEXT_LENGTH),
        Conventions.model_validate({**released.conventions.model_dump(), **conventions}),
    )


def tiny_parts(variant: str, dtype: torch.dtype = torch.float32, seed: int = 5, **conventions: Any) -> dict[Kind, Part]:
    """Return a tiny random transformer of a released variant, and a VAE that goes with it."""
    settings = tiny_settings(variant, **conventions)
    vae = VAESettings(SMALL_VAE.model_copy(update={"scaling_factor": settings.scaling_factor}))
    return {"transformer": drawn_part(settings, dtype, seed), "vae": drawn_part(vae, dtype, seed)}
