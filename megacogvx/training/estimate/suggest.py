"""Tries every layout of a training on a number of GPUs and ranks those that fit by the seconds of a sample."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from megacogvx.models.transformer.flops import forward_flops
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.recompute import POLICIES
from megacogvx.training.config import TrainConfig
from megacogvx.training.estimate.machine import Machine
from megacogvx.training.estimate.memory import Ops
from megacogvx.training.estimate.prediction import Prediction, predict
from megacogvx.training.estimate.workload import Workload

MOST_LAYOUTS = 8  # packs that stand for a step's hundreds
STAGES, RINGS = (1, 2, 4, 8), (1, 2, 4, 8)
LARGEST_CHANGE = 0.25  # of the packs of a step, where the config asks for samples


def suggest(
    config: TrainConfig, work: Workload, machine: Machine, gpus: int, ops: Ops = "fused", bytes_per_weight: int = 2
) -> list[Prediction]:
    """Return the layouts that fit the GPUs' memory and break no rule, fastest (per pack) first.

    Where the config asks for samples, the packs of a step are rounded to what divides, by a quarter at most.
    """
    work, found = _fewer_packs(config, work), []
    for parallel in layouts(config, machine, gpus):
        packs = _packs_that_divide(work, parallel, gpus)
        if packs is None:
            continue
        tried = config.model_copy(update={"parallel": parallel})
        prediction = predict(tried, replace(work, packs=packs), machine, gpus, ops, bytes_per_weight)
        if prediction.fits(machine) and not prediction.broken:
            found.append(prediction)
    return sorted(found, key=lambda prediction: prediction.step_seconds / prediction.packs)


def layouts(config: TrainConfig, machine: Machine, gpus: int) -> Iterator[ParallelConfig]:
    """Yield the layouts whose sizes divide: tensor ranks within a node, heads over tensor x context ranks."""
    heads = config.model.num_attention_heads
    for tensor, ulysses, ring in _splits(heads, machine.node):
        ranks = tensor * ulysses * ring
        if ranks > gpus or config.data.tokens_per_pack % ranks:
            continue
        for stages in STAGES:
            if stages > config.model.num_layers or gpus % (ranks * stages):
                continue
            sizes = {
                "tensor_parallel_size": tensor, "context_parallel_size": ulysses * ring, "ring_size": ring,
                "pipeline_parallel_size": stages, "pipeline_layers": None,
            }  # fmt: skip
            for policy in POLICIES:
                yield config.parallel.model_copy(update={**sizes, "recompute": policy})


def _splits(heads: int, node: int) -> Iterator[tuple[int, int, int]]:
    """Yield (tensor, exchanging heads, ring) sizes; rings only where they reach beyond a node."""
    for ranks in (size for size in range(1, heads + 1) if heads % size == 0):
        for tensor in (size for size in range(1, min(ranks, node) + 1) if ranks % size == 0):
            for ring in RINGS:
                if ring == 1 or ranks * ring > node:
                    yield tensor, ranks // tensor, ring


def _packs_that_divide(work: Workload, parallel: ParallelConfig, gpus: int) -> int | None:
    replicas = gpus // parallel.replica_size
    if work.samples is None:
        return work.packs
    packs = max(1, round(work.packs / replicas)) * replicas
    return packs if abs(packs - work.packs) <= LARGEST_CHANGE * work.packs else None


def _fewer_packs(config: TrainConfig, work: Workload) -> Workload:
    """Return `work` with at most `MOST_LAYOUTS` of its packs, the costliest among them."""
    ranked = sorted(work.layouts, key=lambda layout: forward_flops(config.model, layout), reverse=True)
    every = -(-len(ranked) // MOST_LAYOUTS)
    return replace(work, layouts=tuple(ranked[::every]))
