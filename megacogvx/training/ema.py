"""The exponential moving average of a model's weights, which is used where the model is, not where it learns.

It works on the tensors of this rank, whatever layout they are cut by. Data and context ranks hold equal weights, so
they share the averages: each keeps those of some whole tensors, and gives them to the others when they are used.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import nn

from megacogvx.config import Section
from megacogvx.parallel.data_parallel import broadcast_from
from megacogvx.parallel.groups import ParallelGroups
from megacogvx.parallel.sharded_state import sharded_state_dict

PREFIX = "ema."  # of the averages' names in a checkpoint


class EMAConfig(Section):
    """Config section `ema`: the moving average of the weights; the published models' is 0.9999."""

    decay: float = Field(0.0, ge=0, lt=1, description="what each step keeps of the average; 0 keeps none at all")


class WeightAverage:
    """The average of every floating tensor of a model's state, in fp32; other tensors are taken as they are.

    Attributes:
        owners: tensor -> the data-context rank that keeps its average, equal on all ranks.
        averages: of this rank's own tensors.

    Args:
        model: the model itself, not its data-parallel wrapper; its weights of now start the average.
        decay: what a step keeps of the average. The first steps keep less, (1 + n) / (10 + n) after n of them, so that
            the average soon forgets the weights that it started from.
        groups: process groups.
    """

    def __init__(self, model: nn.Module, decay: float, groups: ParallelGroups) -> None:
        self.model, self.decay, self.groups = model, decay, groups
        self.rank, ranks = groups.data_context_group.rank(), groups.data_context_group.size()
        sizes = {name: tensor.numel() * (4 if tensor.is_floating_point() else 8) for name, tensor in self._tensors()}
        self.owners = deal(sizes, ranks)
        self.restart()

    def restart(self) -> None:
        """Start the average with the model's weights of now."""
        self.averages = {name: _copy(tensor) for name, tensor in self._own()}

    @torch.no_grad()
    def update(self, step: int) -> dict[str, Any]:
        """Take the weights after optimizer step `step` (from 0) into the average: a <- d a + (1 - d) w.

        Returns:
            nothing for the log.
        """
        keep = min(self.decay, (1 + step) / (10 + step))
        for name, tensor in self._own():
            if tensor.is_floating_point():
                self.averages[name].lerp_(tensor.float(), 1 - keep)
            else:
                self.averages[name].copy_(tensor)
        return {}

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Put the averages into the model, and its own weights back at the end; every rank calls it."""
        own = {name: tensor.clone() for name, tensor in self._tensors()}
        try:
            self._put_averages()
            yield
        finally:
            for name, tensor in self._tensors():
                tensor.copy_(own[name])

    def sharded_state_dict(self) -> dict[str, Any]:
        """Return this rank's averages as sharded tensors, cut as the model's; loading writes into them.

        No other data or context rank has them, so each is the one that is written.
        """
        sharded = sharded_state_dict(self.model, self.groups, prefix=PREFIX)
        parts = {name: sharded[PREFIX + name] for name in self.averages}
        return {
            PREFIX + name: replace(
                part, data=self.averages[name], dtype=self.averages[name].dtype, replica_id=(*part.replica_id[:2], 0)
            )
            for name, part in parts.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `sharded_state_dict` described."""
        for name, tensor in state.items():
            self.averages[name.removeprefix(PREFIX)].copy_(tensor)

    @torch.no_grad()
    def _put_averages(self) -> None:
        for name, tensor in self._tensors():
            if name in self.averages:
                tensor.copy_(self.averages[name])
            broadcast_from(tensor, self.owners[name], self.groups)

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the model's own tensors; what else a state holds (FP8's scales) is no weight."""
        for name, value in self.model.state_dict().items():
            if isinstance(value, torch.Tensor):
                yield name, value

    def _own(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, tensor) for name, tensor in self._tensors() if self.owners[name] == self.rank)


def deal(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Deal tensors to ranks, the largest first, each to the rank that holds the least; depends on nothing else.

    Args:
        sizes: bytes by name.
        ranks: how many ranks share them.
    """
    held = [(0, rank) for rank in range(ranks)]
    owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        size, rank = heapq.heappop(held)
        owners[name] = rank
        heapq.heappush(held, (size + sizes[name], rank))
    return owners


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().float().clone() if tensor.is_floating_point() else tensor.clone()
