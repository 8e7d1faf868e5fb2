"""The exponential moving average of a model's weights, which is used where the model is, not where it learns.

It works on the tensors of this rank alone, whatever layout they are cut by, and says nothing to other ranks: equal
weights have equal averages.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import nn

from megacogvx.config import Section
from megacogvx.parallel.groups import ParallelGroups
from megacogvx.parallel.sharded_state import sharded_state_dict

PREFIX = "ema."  # of the averages' names in a checkpoint


class EMAConfig(Section):
    """Config section `ema`: the moving average of the weights; the published models' is 0.9999."""

    decay: float = Field(0.0, ge=0, lt=1, description="what each step keeps of the average; 0 keeps none at all")


class WeightAverage:
    """The average of every floating tensor of a model's state, in fp32; other tensors are taken as they are.

    Args:
        model: the model itself, not its data-parallel wrapper; its weights of now start the average.
        decay: what a step keeps of the average. The first steps keep less, (1 + n) / (10 + n) after n of them, so that
            the average soon forgets the weights that it started from.
        groups: process groups, for checkpoints.
    """

    def __init__(self, model: nn.Module, decay: float, groups: ParallelGroups) -> None:
        self.model, self.decay, self.groups = model, decay, groups
        self.restart()

    def restart(self) -> None:
        """Start the average with the model's weights of now."""
        self.averages = {name: _copy(tensor) for name, tensor in self.model.state_dict().items()}

    @torch.no_grad()
    def update(self, step: int) -> dict[str, Any]:
        """Take the weights after optimizer step `step` (from 0) into the average: a <- d a + (1 - d) w.

        Returns:
            nothing for the log.
        """
        keep = min(self.decay, (1 + step) / (10 + step))
        for name, tensor in self.model.state_dict().items():
            if tensor.is_floating_point():
                self.averages[name].lerp_(tensor.float(), 1 - keep)
            else:
                self.averages[name].copy_(tensor)
        return {}

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Put the averages into the model, and its own weights back at the end."""
        own = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        try:
            self.model.load_state_dict(self.averages)
            yield
        finally:
            self.model.load_state_dict(own)

    def sharded_state_dict(self) -> dict[str, Any]:
        """Return the averages as sharded tensors, cut as the model's; loading writes into them."""
        sharded = sharded_state_dict(self.model, self.groups, prefix=PREFIX)
        return {
            name: replace(part, data=average, dtype=average.dtype)
            for name, part in sharded.items()
            for average in [self.averages[name.removeprefix(PREFIX)]]
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `sharded_state_dict` described."""
        for name, tensor in state.items():
            self.averages[name.removeprefix(PREFIX)].copy_(tensor)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().float().clone() if tensor.is_floating_point() else tensor.clone()
