"""Every parameter of the transformer with its shape, from the config alone; a test holds the list to the real model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal

from megacogvx.models.transformer.config import CogVideoXConfig
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.pipeline_parallel import split_layers

Part = Literal["embedding", "time", "adaln", "attention", "mlp", "norms", "head"]
PARTS: tuple[Part, ...] = ("embedding", "time", "adaln", "attention", "mlp", "norms", "head")


@dataclass(frozen=True)
class Weight:
    """One parameter.

    Attributes:
        name: in the model, such as `blocks.3.mlp.fc1.weight`.
        part: what it belongs to.
        shape: over all tensor ranks.
        cut: the axis along which tensor ranks share it; None: each holds it whole.
        summed: each tensor rank sees only its tokens or heads, so their gradients are added.
    """

    name: str
    part: Part
    shape: tuple[int, ...]
    cut: int | None = None
    summed: bool = False

    def local_shape(self, tensor_ranks: int) -> tuple[int, ...]:
        """Return the shape that one tensor rank holds."""
        return tuple(size // tensor_ranks if axis == self.cut else size for axis, size in enumerate(self.shape))

    def local_size(self, tensor_ranks: int) -> int:
        """Return the elements that one tensor rank holds."""
        return prod(self.local_shape(tensor_ranks))


def stage_weights(config: CogVideoXConfig, parallel: ParallelConfig, stage: int = 0) -> tuple[Weight, ...]:
    """Return the parameters of one pipeline stage, in the model's order.

    Raises:
        ConfigError: the layers can't be split over the stages.
    """
    stages = parallel.pipeline_parallel_size
    layers = split_layers(config.num_layers, stages, parallel.pipeline_layers)[stage]
    return _weights(config, layers, stage == 0, stage == stages - 1)


def local_sizes(config: CogVideoXConfig, parallel: ParallelConfig, stage: int = 0) -> tuple[int, ...]:
    """Return the elements of every parameter that one rank of a stage holds, in the order of `stage_weights`.

    Raises:
        ConfigError: the layers can't be split over the stages.
    """
    stages = parallel.pipeline_parallel_size
    layers = split_layers(config.num_layers, stages, parallel.pipeline_layers)[stage]
    return _local_sizes(config, layers, stage == 0, stage == stages - 1, parallel.tensor_parallel_size)


# Hundreds of layouts ask for the same few stages.
@lru_cache(maxsize=256)
def _local_sizes(config: CogVideoXConfig, layers: range, first: bool, last: bool, tensor_ranks: int) -> tuple[int, ...]:
    return tuple(weight.local_size(tensor_ranks) for weight in _weights(config, layers, first, last))


@lru_cache(maxsize=64)
def _weights(config: CogVideoXConfig, layers: range, first: bool, last: bool) -> tuple[Weight, ...]:
    weights = list(_time(config))
    if first:
        weights += _linear("embedding.video_proj", "embedding", config.row_size_in, config.hidden_size, summed=True)
        weights += _linear("embedding.text_proj", "embedding", config.text_embed_dim, config.hidden_size, summed=True)
    for layer in layers:
        weights += _block(config, f"blocks.{layer}")
    if last:
        weights += _head(config)
    return tuple(weights)


def count_parameters(config: CogVideoXConfig) -> dict[Part, int]:
    """Return the parameters of the whole model, by part."""
    counts = dict.fromkeys(PARTS, 0)
    for weight in stage_weights(config, ParallelConfig()):
        counts[weight.part] += prod(weight.shape)
    return counts


def _time(config: CogVideoXConfig) -> Iterator[Weight]:
    condition = config.time_embed_dim
    yield from _linear("time.timestep.linear_1", "time", config.hidden_size, condition)
    yield from _linear("time.timestep.linear_2", "time", condition, condition)
    if config.ofs_embed_dim is not None:
        yield from _linear("time.ofs.linear_1", "time", config.ofs_embed_dim, config.ofs_embed_dim)
        yield from _linear("time.ofs.linear_2", "time", config.ofs_embed_dim, config.ofs_embed_dim)


def _block(config: CogVideoXConfig, name: str) -> Iterator[Weight]:
    width, inner = config.hidden_size, config.ffn_hidden_size
    yield from _modulated_norm(config, f"{name}.attention")
    yield from _linear(f"{name}.attention.qkv", "attention", width, 3 * width, cut="columns")
    yield from _norm(f"{name}.attention.q_norm", "norms", config.attention_head_dim)
    yield from _norm(f"{name}.attention.k_norm", "norms", config.attention_head_dim)
    yield from _linear(f"{name}.attention.out", "attention", width, width, cut="rows")
    yield from _modulated_norm(config, f"{name}.mlp")
    yield from _linear(f"{name}.mlp.fc1", "mlp", width, inner, cut="columns")
    yield from _linear(f"{name}.mlp.fc2", "mlp", inner, width, cut="rows")


def _modulated_norm(config: CogVideoXConfig, name: str) -> Iterator[Weight]:
    yield from _linear(
        f"{name}_modulation.linear", "adaln", config.time_embed_dim, 6 * config.hidden_size, cut="columns"
    )
    yield from _norm(f"{name}_norm", "norms", config.hidden_size)


def _head(config: CogVideoXConfig) -> Iterator[Weight]:
    width = config.hidden_size
    yield from _norm("head.norm_final", "norms", width)
    yield from _norm("head.norm_out", "norms", width)
    yield from _linear("head.modulation.linear", "adaln", config.time_embed_dim, 2 * width, cut="columns")
    yield from _linear("head.proj", "head", width, config.row_size_out, summed=True)


def _linear(
    name: str, part: Part, fan_in: int, fan_out: int, *,
    cut: Literal["columns", "rows"] | None = None, summed: bool = False,
) -> Iterator[Weight]:  # fmt: skip
    """Yield weight and bias; a cut by rows (of input features) leaves the bias whole and its gradient to be added."""
    axis = {"columns": 0, "rows": 1, None: None}[cut]
    yield Weight(f"{name}.weight", part, (fan_out, fan_in), axis, summed)
    yield Weight(f"{name}.bias", part, (fan_out,), 0 if cut == "columns" else None, summed or cut == "rows")


def _norm(name: str, part: Part, width: int) -> Iterator[Weight]:
    yield Weight(f"{name}.weight", part, (width,), summed=True)
    yield Weight(f"{name}.bias", part, (width,), summed=True)
