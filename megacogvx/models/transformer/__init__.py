"""The expert-AdaLN diffusion transformer of CogVideoX (paper section 2.2, figure 3)."""

from megacogvx.models.transformer.config import PRESETS, CogVideoXConfig
from megacogvx.models.transformer.initialize import initialize_weights
from megacogvx.models.transformer.model import CogVideoXTransformer, transformer_core
from megacogvx.models.transformer.rope import place_on_rope_grid

__all__ = [
    "PRESETS",
    "CogVideoXConfig",
    "CogVideoXTransformer",
    "initialize_weights",
    "place_on_rope_grid",
    "transformer_core",
]
