"""Activation recompute: keep less in the forward pass, compute the rest again in the backward pass.

Chen et al. 2016; selective recompute: Korthikanti et al. 2022, section 5. `recompute` forgets what happens inside a
function, `Discarded` forgets what comes out of it as well, which the next operation would keep otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from torch import nn

POLICIES = ("none", "selective", "keep_attention", "full")


def block_policy(setting: str, place: int) -> str:
    """Return what one block does, one of `POLICIES`.

    Args:
        setting: `parallel.recompute`.
        place: the block's place among those of its pipeline stage, from 0.
    """
    if setting.startswith("block:"):
        return "full" if place < int(setting.removeprefix("block:")) else "none"
    assert setting in POLICIES, f"{setting!r} is not one of {POLICIES}"
    return setting


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
    run, tensors = _of_tensors(function, arguments)
    return tensor_parallel.checkpoint(run, False, *tensors)


class Discarded:
    """A step whose results are thrown away once the next operation has read them, and made again for its backward.

        step = Discarded(True)
        normed = step.run(norm, x)      # keeps x
        y = linear(normed)              # would keep normed
        step.until(y)                   # normed is empty from here on, until the gradient of y is known

    Nothing but the operation between `run` and `until` may read the results, and that operation must keep them
    themselves, not copies. They must not share memory with the step's arguments.

    Args:
        on: False runs the step as if it stood there alone.
    """

    def __init__(self, on: bool) -> None:
        # None, not False: megatron-core asks whether it is None.
        self.inner = CheckpointWithoutOutput(fp8=None) if on and torch.is_grad_enabled() else None

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return `function(*arguments)`; the same is asked of the two as in `recompute`."""
        if self.inner is None:
            return function(*arguments)
        run, tensors = _of_tensors(function, arguments)
        return self.inner.checkpoint(run, *tensors)

    def until(self, result: torch.Tensor) -> None:
        """Throw the step's results away until the gradient of `result`, made of them, is known."""
        if self.inner is not None:
            self.inner.discard_output_and_register_recompute(result)


def _of_tensors(
    function: Callable[..., Any], arguments: tuple[Any, ...]
) -> tuple[Callable[..., Any], list[torch.Tensor]]:
    """Return `function` as one of its floating-point arguments alone, and these.

    Integer tensors are closed over: `function` gets the very objects again, not detached copies, so what the ops of
    kernels/ have looked up for them once stays known.
    """
    places = [
        place
        for place, argument in enumerate(arguments)
        if isinstance(argument, torch.Tensor) and argument.is_floating_point()
    ]
    tensors = [arguments[place] for place in places]
    assert any(tensor.requires_grad for tensor in tensors), (
        "recompute of a function none of whose inputs needs gradients"
    )

    # What lives as long as the graph holds no tensor, so that each is freed once its gradient is known.
    others = [None if place in places else argument for place, argument in enumerate(arguments)]

    def run(*tensors: torch.Tensor) -> Any:
        filled = list(others)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        results = function(*filled)
        assert not any(isinstance(result, nn.Parameter) for result in _as_tuple(results)), "a parameter is returned"
        return results

    return run, tensors


def _as_tuple(results: Any) -> tuple[Any, ...]:
    return results if isinstance(results, tuple) else (results,)
