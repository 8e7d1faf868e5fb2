"""Activation recompute: keep the input of a block, compute the rest again in the backward pass (Chen et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer import TransformerConfig
from torch import nn


def recomputes(core: TransformerConfig) -> bool:
    """Return whether the blocks are to be recomputed (`parallel.recompute=full`)."""
    return bool(core.recompute_granularity == "full")


def recompute(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return `function(*arguments)`, keeping only the arguments for the backward pass.

    The generators of megatron-core are set back for the second run, so that dropout repeats itself.

    Args:
        function: returns a tensor or a tuple of tensors. Every tensor with a history must reach it as an argument:
            one that it merely closes over would be differentiated once per block. It must not return a parameter of
            its own (a bias, say), which megatron-core's version would turn from a leaf into a result.
        arguments: tensors and other values; at least one tensor must need a gradient, or the parameters that
            `function` uses would silently get none.
    """
    if not torch.is_grad_enabled():
        return function(*arguments)
    places = [place for place, argument in enumerate(arguments) if isinstance(argument, torch.Tensor)]
    tensors = [arguments[place] for place in places]
    assert any(tensor.requires_grad for tensor in tensors), (
        "recompute of a function none of whose inputs needs gradients"
    )

    def run(*tensors: torch.Tensor) -> Any:
        filled = list(arguments)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        results = function(*filled)
        assert not any(isinstance(result, nn.Parameter) for result in _as_tuple(results)), "a parameter is returned"
        return results

    return tensor_parallel.checkpoint(run, False, *tensors)


def _as_tuple(results: Any) -> tuple[Any, ...]:
    return results if isinstance(results, tuple) else (results,)
