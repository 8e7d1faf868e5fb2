"""Numbers of parameters in closed form, for every block and attention of the config; the model is not built."""

from __future__ import annotations

from megacogvx.models.transformer.config import CogVideoXConfig


def parameter_count(config: CogVideoXConfig) -> int:
    """Return the parameters of the whole model; the learned position table, a buffer, is not one of them."""
    return config.num_layers * block_parameter_count(config) + outer_parameter_count(config)


def block_parameter_count(config: CogVideoXConfig) -> int:
    """Return the parameters of one block.

    12 D^2 + 9 D of qkv (3 D), out (D) and MLP (4 D and back), twice where the modalities have their own; two
    modulations of 6 D, or 3 D where they are shared, from the condition; two norms over D, one each over q and k.
    """
    width, ffn = config.hidden_size, config.ffn_hidden_size
    linears = _linear(width, 3 * width) + _linear(width, width) + _linear(width, ffn) + _linear(ffn, width)
    modulation = _linear(config.time_embed_dim, (3 if config.block == "shared_adaln" else 6) * width)
    norms = 4 * width + 4 * config.attention_head_dim
    return (2 if config.block == "mmdit" else 1) * linears + 2 * modulation + norms


def outer_parameter_count(config: CogVideoXConfig) -> int:
    """Return the parameters outside the blocks: embeddings of video, text, timestep and motion offset, and the head."""
    width, condition = config.hidden_size, config.time_embed_dim
    embeddings = _linear(config.row_size_in, width) + _linear(config.text_embed_dim, width)
    time = _linear(width, condition) + _linear(condition, condition)
    offset = 2 * _linear(config.ofs_embed_dim, config.ofs_embed_dim) if config.ofs_embed_dim else 0
    head = 4 * width + _linear(condition, 2 * width) + _linear(width, config.row_size_out)
    return embeddings + time + offset + head


def with_parameters_of(config: CogVideoXConfig, reference: CogVideoXConfig) -> CogVideoXConfig:
    """Return `config` with as many layers as bring it nearest to the parameters of `reference`."""
    budget = parameter_count(reference) - outer_parameter_count(config)
    return config.model_copy(update={"num_layers": max(1, round(budget / block_parameter_count(config)))})


def _linear(width_in: int, width_out: int) -> int:
    return width_in * width_out + width_out
