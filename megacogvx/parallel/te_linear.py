"""Transformer Engine's linear layers over the tensor ranks, through megatron-core's wrappers, in FP8 if asked.

The wrappers are `TEColumnParallelLinear` and `TERowParallelLinear` of `megatron/core/extensions/transformer_engine.py`,
the FP8 context `get_fp8_context` of `megatron/core/fp8_utils.py` (0.16.1). Weights keep the precision of the model; FP8
is what they are multiplied in.
"""

from __future__ import annotations

import copy
from functools import cache
from types import ModuleType
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from torch import nn

from megacogvx.parallel.groups import ParallelGroups


class _WithBias:
    """Put before one of the wrappers: its result alone, in the config's FP8, and no state beside the parameters."""

    config: TransformerConfig

    def forward(self, x_SBD: torch.Tensor) -> torch.Tensor:
        """As the layer of the same name in `tensor_parallel`.

        Each call enters the FP8 context by itself, so that a recompute, which runs outside of the first, does too.
        """
        from megatron.core.fp8_utils import get_fp8_context

        with get_fp8_context(self.config):
            out: torch.Tensor = super().forward(x_SBD)[0]  # type: ignore[misc]
        return out

    # Transformer Engine keeps the history of its scales here, which our recipes have none of; the checkpoint of a model
    # would differ by whose linear layers it has.
    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state


def column_linear(in_features: int, out_features: int, core: TransformerConfig, groups: ParallelGroups) -> nn.Module:
    """Make Transformer Engine's counterpart of `tensor_parallel.ColumnLinear`."""
    layer = _wrapper("TEColumnParallelLinear")(
        in_features, out_features, gather_output=False, **_arguments(core, groups)
    )
    set_tensor_model_parallel_attributes(layer.weight, True, 0, 1)
    set_tensor_model_parallel_attributes(layer.bias, True, 0, 1)
    return layer


def row_linear(in_features: int, out_features: int, core: TransformerConfig, groups: ParallelGroups) -> nn.Module:
    """Make Transformer Engine's counterpart of `tensor_parallel.RowLinear`."""
    layer = _wrapper("TERowParallelLinear")(
        in_features, out_features, input_is_parallel=True, **_arguments(core, groups)
    )
    set_tensor_model_parallel_attributes(layer.weight, True, 1, 1)
    layer.bias.sequence_parallel = core.sequence_parallel  # added to this rank's tokens alone
    return layer


def never_called(weight: torch.Tensor) -> None:
    """Stand where an initialisation goes: every weight of this project is drawn in full and then cut."""
    raise AssertionError("megatron-core's own initialisation is off")


def _arguments(core: TransformerConfig, groups: ParallelGroups) -> dict[str, Any]:
    on_gpu = copy.copy(core)
    on_gpu.use_cpu_initialization = False  # would make the full weight on the host, to cut its own values out of it
    return {
        "config": on_gpu,
        "init_method": never_called,
        "bias": True,
        "skip_bias_add": False,
        "is_expert": False,
        "tp_group": groups.tensor_group,
    }


def _wrapper(name: str) -> type[Any]:
    from megatron.core.extensions import transformer_engine

    return _with_bias(transformer_engine, name)


@cache
def _with_bias(wrappers: ModuleType, name: str) -> type[Any]:
    return type(name, (_WithBias, getattr(wrappers, name)), {})
