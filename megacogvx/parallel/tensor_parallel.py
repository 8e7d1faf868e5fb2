"""Column and row linear over the tensor ranks, made the same way everywhere.

Both are megatron-core's (Shoeybi et al. 2019, section 3; sequence parallelism: Korthikanti et al. 2022, section 4.2)
with a forward that returns the result with its bias in it, or, where the config asks for it, Transformer Engine's
(`te_linear.py`). Weights are allocated, never filled: every weight of this
project is drawn in full and then cut.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import TransformerConfig
from torch import nn

from megacogvx.errors import ConfigError
from megacogvx.log import get_logger
from megacogvx.parallel import te_linear
from megacogvx.parallel.groups import ParallelGroups
from megacogvx_kernels.gelu_linear import gelu_linear

logger = get_logger(__name__)


class ColumnLinear(ColumnParallelLinear):
    """`y = x W^T + b`, the output features cut over the tensor ranks."""

    def forward(self, x_SBD: torch.Tensor) -> torch.Tensor:
        """Return this rank's output features for all tokens.

        Args:
            x_SBD: `[S, 1, D]`; under sequence parallelism this rank's share of the tokens, else all of them.

        Returns:
            `[S, 1, features / tensor ranks]`, of all tokens that the tensor ranks hold together.

        Backward: the gradient of x is summed over the tensor ranks; under sequence parallelism each keeps its tokens.
        """
        result, bias = super().forward(x_SBD)
        return result.add_(bias)  # in its place: megatron-core's own sum would be one more tensor of this width


class RowLinear(RowParallelLinear):
    """`y = x W^T + b`, the input features cut over the tensor ranks; the bias is added once, after the sum."""

    def forward(self, x_SBD: torch.Tensor) -> torch.Tensor:
        """Return the sum over the tensor ranks, plus the bias.

        Args:
            x_SBD: `[S, 1, features / tensor ranks]`, all tokens that the tensor ranks hold together.

        Returns:
            `[S, 1, D]`; under sequence parallelism this rank's share of the tokens, else all of them.

        Backward: the gradient of x is gathered over tokens under sequence parallelism, else copied.
        """
        return super().forward(x_SBD)[0]


class GeluRowLinear(RowLinear):
    """`y = gelu(x) W^T + b`, cut as a `RowLinear`; keeps x and not gelu(x) for the backward pass (op `gelu_linear`)."""

    keep_gelu = False  # True: gelu(x), too

    def _forward_impl(
        self, input: torch.Tensor, weight: torch.Tensor, *, gradient_accumulation_fusion: bool, **_: Any
    ) -> torch.Tensor:
        """Stand where megatron-core multiplies a row-parallel layer's own shards; nothing is sent here."""
        assert not gradient_accumulation_fusion, "gelu_linear returns the weight's gradient"
        if not input.numel():  # a rank without tokens of one modality; the gradient of its weight is zeros, not missing
            return input @ weight.t()
        return gelu_linear(input, weight, keep_gelu=self.keep_gelu)


class ModulationLinear(nn.Module):
    """A projection of the conditioning: weight cut over the tensor ranks, output whole on each of them.

    The conditioning is not a sequence, so it enters whole also under sequence parallelism. What reads the output is
    cut by tokens then, so each rank's gradient of it is a partial sum: they are added, never averaged.

    Args:
        in_features, out_features: widths of the whole projection.
        core: megatron-core's settings.
        groups: process groups.
    """

    def __init__(self, in_features: int, out_features: int, core: TransformerConfig, groups: ParallelGroups) -> None:
        super().__init__()
        self.group = groups.tensor_group
        self.sequence_parallel = core.sequence_parallel
        whole = copy.copy(core)
        whole.sequence_parallel = False
        whole.transformer_impl = "local"  # M rows: nothing to win, and FP8 takes whole blocks of rows only
        self.linear = column_linear(in_features, out_features, whole, groups)

    def forward(self, x_ME: torch.Tensor) -> torch.Tensor:
        """Return the projection, whole on every tensor rank.

        Args:
            x_ME: `[M, in_features]`, equal on the tensor ranks.

        Returns:
            `[M, out_features]`.

        Backward: under sequence parallelism the gradients of the tensor ranks are summed, each keeping its features;
            without it they are equal, and each cuts out its features.
        """
        y = self.linear(x_ME)
        if self.sequence_parallel:
            return mappings.all_gather_last_dim_from_tensor_parallel_region(y, group=self.group)
        return mappings.gather_from_tensor_model_parallel_region(y, group=self.group)


def column_linear(in_features: int, out_features: int, core: TransformerConfig, groups: ParallelGroups) -> nn.Module:
    """Make a linear layer whose output features are cut over the tensor ranks.

    Raises:
        ConfigError: `out_features` doesn't divide by the tensor ranks.
    """
    _check_divides("out_features", out_features, groups)
    if core.transformer_impl == "transformer_engine":
        _say("Transformer Engine's", f", in FP8: {core.fp8}, recipe {core.fp8_recipe}" if core.fp8 else "")
        return te_linear.column_linear(in_features, out_features, core, groups)
    _say("megatron-core's own", "")
    layer = ColumnLinear(
        in_features,
        out_features,
        config=core,
        init_method=te_linear.never_called,
        bias=True,
        gather_output=False,
        skip_bias_add=True,  # `forward` adds it
        tp_group=groups.tensor_group,
    )
    # megatron-core marks the weight while it initialises it, which is off here. Without the mark the gradient norm
    # would count the shard of rank 0 alone, as if all ranks held the same.
    set_tensor_model_parallel_attributes(layer.weight, True, 0, 1)
    return layer


@lru_cache
def _say(whose: str, precision: str) -> None:
    """Log whose linear layers are made, once for each; the AdaLN projections are never Transformer Engine's."""
    logger.info("linear layers: %s (parallel.transformer_impl)%s", whose, precision)


def row_linear(
    in_features: int,
    out_features: int,
    core: TransformerConfig,
    groups: ParallelGroups,
    kind: type[RowLinear] = RowLinear,
) -> nn.Module:
    """Make a linear layer whose input features are cut over the tensor ranks.

    Args:
        in_features, out_features: widths of the whole layer.
        core: megatron-core's settings.
        groups: process groups.
        kind: which of the classes here; Transformer Engine has `RowLinear`'s counterpart alone.

    Raises:
        ConfigError: `in_features` doesn't divide by the tensor ranks.
    """
    _check_divides("in_features", in_features, groups)
    if core.transformer_impl == "transformer_engine":
        return te_linear.row_linear(in_features, out_features, core, groups)
    layer = kind(
        in_features,
        out_features,
        config=core,
        init_method=te_linear.never_called,
        bias=True,
        input_is_parallel=True,
        skip_bias_add=False,
        tp_group=groups.tensor_group,
    )
    set_tensor_model_parallel_attributes(layer.weight, True, 1, 1)  # see column_linear
    return layer


def shard_of(full: torch.Tensor, parameter: torch.Tensor, groups: ParallelGroups) -> torch.Tensor:
    """Return the part of a full tensor that this rank's `parameter` stands for (all of it if it isn't cut).

    Args:
        full: the tensor as one process would hold it.
        parameter: this rank's parameter, which knows along which axis it is cut.
        groups: process groups.
    """
    if not is_cut(parameter):
        part = full
    else:
        rank, size = groups.tensor
        part = full.chunk(size, dim=parameter.partition_dim)[rank]  # type: ignore[attr-defined]
    assert part.shape == parameter.shape, f"{tuple(part.shape)} cut from {tuple(full.shape)}, not {parameter.shape}"
    return part


def full_shape(parameter: torch.Tensor, groups: ParallelGroups) -> tuple[int, ...]:
    """Return the shape that one process would hold for this rank's `parameter`."""
    shape = list(parameter.shape)
    if is_cut(parameter):
        shape[parameter.partition_dim] *= groups.tensor[1]  # type: ignore[attr-defined]
    return tuple(shape)


def is_cut(parameter: torch.Tensor) -> bool:
    """Return whether the tensor ranks hold different parts of this parameter."""
    return bool(getattr(parameter, "tensor_model_parallel", False))


def _check_divides(name: str, features: int, groups: ParallelGroups) -> None:
    size = groups.tensor[1]
    if features % size:
        works = [number for number in range(1, features + 1) if features % number == 0]
        raise ConfigError(
            f"{name}={features} cannot be split over parallel.tensor_parallel_size={size}; "
            f"sizes that work: {', '.join(map(str, works))}"
        )
