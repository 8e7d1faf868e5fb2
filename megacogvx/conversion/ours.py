"""Our parameter names and shapes, for whole models: what every conversion passes through."""

from __future__ import annotations

import math
from functools import cache

import torch

from megacogvx.models.transformer.config import CogVideoXConfig
from megacogvx.models.vae.config import VAEConfig
from megacogvx.models.vae.model import CogVideoXVAE

Shapes = dict[str, tuple[int, ...]]


def transformer_shapes(config: CogVideoXConfig) -> Shapes:
    """Return name -> shape of every parameter and buffer of the transformer, in the order of the model."""
    width, condition = config.hidden_size, config.time_embed_dim
    shapes = _linear("time.timestep.linear_1", width, condition) | _linear(
        "time.timestep.linear_2", condition, condition
    )
    if config.ofs_embed_dim is not None:
        for name in ("time.ofs.linear_1", "time.ofs.linear_2"):
            shapes |= _linear(name, config.ofs_embed_dim, config.ofs_embed_dim)
    if config.use_learned_positional_embeddings:
        shapes["embedding.positions"] = (config.max_text_seq_length + math.prod(config.native_grid), width)
    shapes |= _linear("embedding.video_proj", config.row_size_in, width)
    shapes |= _linear("embedding.text_proj", config.text_embed_dim, width)
    for layer in range(config.num_layers):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in _block(config).items()}
    shapes |= _norm("head.norm_final", width) | _norm("head.norm_out", width)
    return (
        shapes
        | _linear("head.modulation.linear", condition, 2 * width)
        | _linear("head.proj", width, config.row_size_out)
    )


def vae_shapes(config: VAEConfig) -> Shapes:
    """Return name -> shape of every parameter of the VAE, in the order of the model."""
    return dict(_vae_shapes(config))


@cache
def _vae_shapes(config: VAEConfig) -> Shapes:
    with torch.device("meta"):
        model = CogVideoXVAE(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _block(config: CogVideoXConfig) -> Shapes:
    width, head = config.hidden_size, config.attention_head_dim
    return {
        **_linear("attention_modulation.linear", config.time_embed_dim, 6 * width),
        **_norm("attention_norm", width),
        **_linear("attention.qkv", width, 3 * width),
        **_norm("attention.q_norm", head),
        **_norm("attention.k_norm", head),
        **_linear("attention.out", width, width),
        **_linear("mlp_modulation.linear", config.time_embed_dim, 6 * width),
        **_norm("mlp_norm", width),
        **_linear("mlp.fc1", width, config.ffn_hidden_size),
        **_linear("mlp.fc2", config.ffn_hidden_size, width),
    }


def _linear(name: str, width_in: int, width_out: int) -> Shapes:
    return {f"{name}.weight": (width_out, width_in), f"{name}.bias": (width_out,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}
