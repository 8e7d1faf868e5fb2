"""Bytes that one rank sends in a step, as a closed form with named terms; a test counts a real step's against it.

Sent by one of g ranks: (g-1)/g of the whole tensor for all-gather and reduce-scatter, twice that for all-reduce,
(g-1)/g of its own tensor for all-to-all, as the usual ring algorithms send; all of it between pipeline stages.
Per block and pack of S tokens that is, with A = S/c * D numbers,

    tensor ranks    forward 4 A, backward 6 A   (two pairs of column and row linear; the backward pass gathers the
                                                 inputs of the column linears again: Korthikanti et al. 2022)
    context ranks   forward 4 A/t, backward 4 A/t   (q, k, v and the output: Jacobs et al. 2023)

each times (g-1)/g, and what a recompute policy runs again once more. In a ring a rank sends keys and values of those of
its tokens that other ranks' tokens attend to, in both passes, and their gradients back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megacogvx.models.transformer.config import CogVideoXConfig
from megacogvx.pack_layout import PackLayout
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.ring_attention import shared_rows
from megacogvx.training.estimate.memory import FP32, stage_layers
from megacogvx.training.estimate.parameters import local_sizes, stage_weights

Axis = Literal["tensor", "context", "ring", "data_context", "pipeline", "all"]
Collective = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send", "broadcast"]
PARAMETER_ALIGNMENT, BUFFER_ALIGNMENT = 64, 128  # elements, of megatron-core's gradient buffers
# After so many elements megatron-core (0.16 `distributed_data_parallel.py`) begins another bucket.
BUCKET_ELEMENTS, BUCKET_ELEMENTS_PER_RANK = 40_000_000, 1_000_000
SUMMED = "gradients"  # of what tensor ranks hold whole but see in part: "norms gradients", ...
SHARE = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2, "all_to_all": 1}


@dataclass(frozen=True)
class Traffic:
    """One kind of exchange in a step.

    Attributes:
        term: what it is for, such as "attention" or "gradients".
        axis: between which ranks.
        collective: how.
        times: how often a step.
        tensor_bytes: the whole tensor: what an all-gather returns, what the others start from.
        ranks: size of the group.
    """

    term: str
    axis: Axis
    collective: Collective
    times: int
    tensor_bytes: int
    ranks: int

    @property
    def sent(self) -> float:
        """Bytes that one rank sends in the whole step."""
        if self.collective in ("send", "broadcast"):
            return float(self.times * self.tensor_bytes)
        return self.times * SHARE[self.collective] * self.tensor_bytes * (self.ranks - 1) / self.ranks


def communication(
    config: CogVideoXConfig, parallel: ParallelConfig, layouts: Sequence[PackLayout], *,
    stage: int, data_size: int, bytes_per_weight: int, ring_rank: int | None = None, packs: int | None = None,
) -> list[Traffic]:  # fmt: skip
    """Return everything that a rank of one pipeline stage exchanges in forward, backward and optimizer step.

    The log's sums are left out: they are numbers, not tensors, and not part of the step.

    Args:
        config, parallel: sections `model` and `parallel`.
        layouts: the packs that this rank's replica computes in the step.
        stage: the pipeline stage.
        data_size: data-parallel replicas.
        bytes_per_weight: 2 for bf16, 4 for fp32.
        ring_rank: the rank's place in its ring, with rings; None takes the one that sends most.
        packs: how many packs they stand for, taken in turn; None: they are all.
    """
    counts = _Counts(config, parallel, stage, bytes_per_weight, ring_rank)
    found = []
    for place, layout in enumerate(layouts):
        repeats = 1 if packs is None else len(range(place, packs, len(layouts)))
        found += [replace(entry, times=entry.times * repeats) for entry in counts.of_pack(layout)]
    found += counts.of_step(data_size)
    return [entry for entry in found if entry.ranks > 1 and entry.times and entry.tensor_bytes]


def sent_by_term(traffic: Sequence[Traffic]) -> dict[tuple[str, Axis], float]:
    """Return the bytes sent, summed by (term, axis)."""
    totals: dict[tuple[str, Axis], float] = {}
    for entry in traffic:
        totals[entry.term, entry.axis] = totals.get((entry.term, entry.axis), 0.0) + entry.sent
    return totals


@dataclass(frozen=True)
class _Counts:
    """The settings that every count needs."""

    config: CogVideoXConfig
    parallel: ParallelConfig
    stage: int
    bytes_per_weight: int
    ring_rank: int | None

    def of_pack(self, layout: PackLayout) -> Iterator[Traffic]:
        """Yield what one pack's forward and backward pass exchange."""
        blocks = len(stage_layers(self.config, self.parallel, self.stage))
        again = self._blocks_again(blocks)
        tokens = layout.num_tokens // self.parallel.context_parallel_size
        yield from self._linears(tokens, blocks, again["linear"])
        yield from self._attention_exchange(tokens, blocks, again)
        yield from self._ring(layout, blocks, again["attention"])
        rows, last = layout.num_samples, self.stage == self.parallel.pipeline_parallel_size - 1
        yield from self._modulation("adaln", rows, 6, 2 * blocks)
        yield from self._modulation("head", rows, 2, int(last))
        yield from self._between_stages(tokens)

    def of_step(self, data_size: int) -> Iterator[Traffic]:
        """Yield what is exchanged once a step: gradients, new weights, and the two numbers that scale them."""
        parallel, tensor = self.parallel, self.parallel.tensor_parallel_size
        weights = stage_weights(self.config, parallel, self.stage)
        summed: dict[str, int] = {}
        for weight in weights:
            if weight.summed:
                summed[weight.part] = summed.get(weight.part, 0) + weight.local_size(tensor)
        for part, size in summed.items():  # one all-reduce of them all, told apart here
            yield Traffic(f"{part} {SUMMED}", "tensor", "all_reduce", 1, size * FP32, tensor)
        ranks = data_size * parallel.context_parallel_size
        for size in self._gradient_buckets(ranks):
            yield Traffic("gradients", "data_context", "reduce_scatter", 1, size * FP32, ranks)
            yield Traffic("weights", "data_context", "all_gather", 1, size * self.bytes_per_weight, ranks)
        yield from self._shared_by_stages(ranks)
        yield Traffic("loss count", "data_context", "all_reduce", 1, 4, ranks)
        yield Traffic("loss count", "pipeline", "broadcast", 1, 4, parallel.pipeline_parallel_size)
        yield Traffic("gradient norm", "all", "all_reduce", 1, FP32, data_size * parallel.replica_size)

    def _gradient_buckets(self, ranks: int) -> list[int]:
        """Return the elements of each bucket; megatron-core has several on the first stage only, where they overlap."""
        overlap = self.parallel.overlap_grad_reduce and self.stage == 0
        largest = max(BUCKET_ELEMENTS, BUCKET_ELEMENTS_PER_RANK * ranks) if overlap else None
        return gradient_buckets(local_sizes(self.config, self.parallel, self.stage), ranks, largest)

    def _shared_by_stages(self, data_context_ranks: int) -> Iterator[Traffic]:
        """Yield the sum of the time embedding's gradients, which every stage holds whole."""
        stages = self.parallel.pipeline_parallel_size
        weights = stage_weights(self.config, self.parallel, self.stage)
        size = sum(weight.local_size(1) for weight in weights if weight.part == "time") * FP32 * int(stages > 1)
        yield Traffic("time embedding", "data_context", "all_reduce", 1, size, data_context_ranks)
        yield Traffic("time embedding", "pipeline", "all_reduce", 1, size, stages)

    def _blocks_again(self, blocks: int) -> dict[str, int]:
        """Return how many blocks run again: linears, q and k's exchange, v's and the output's, attention itself."""
        policy = self.parallel.recompute
        if policy.startswith("block:"):
            whole = min(blocks, int(policy.removeprefix("block:")))
        else:
            whole = blocks if policy in ("full", "keep_attention") else 0
        return {
            "linear": whole,
            "q and k": blocks if policy == "selective" else whole,
            "v and out": whole,
            "attention": 0 if policy == "keep_attention" else whole,
        }

    def _linears(self, tokens: int, blocks: int, again: int) -> Iterator[Traffic]:
        """Yield the exchange of tokens around each pair of column and row linear (sequence parallelism)."""
        size, ranks = tokens * self.config.hidden_size * self.bytes_per_weight, self.parallel.tensor_parallel_size
        for term in ("attention", "mlp"):
            yield Traffic(term, "tensor", "all_gather", 3 * blocks + again, size, ranks)
            yield Traffic(term, "tensor", "reduce_scatter", 2 * blocks + again, size, ranks)

    def _attention_exchange(self, tokens: int, blocks: int, again: dict[str, int]) -> Iterator[Traffic]:
        """Yield the exchange of heads for tokens: q, k, v and the output, there and, for their gradients, back."""
        width = self.config.hidden_size // self.parallel.tensor_parallel_size
        times = 8 * blocks + 2 * again["q and k"] + 2 * again["v and out"]
        size, ranks = tokens * width * self.bytes_per_weight, self.parallel.ulysses_size
        yield Traffic("attention", "context", "all_to_all", times, size, ranks)

    def _ring(self, layout: PackLayout, blocks: int, again: int) -> Iterator[Traffic]:
        """Yield the keys and values lent to each rank of the ring, and the gradients of those borrowed from it."""
        ring, share = self.parallel.ring_size, layout.num_tokens // self.parallel.ring_size
        if ring == 1:
            return
        boundaries = layout.boundaries[:-1]
        width = self.config.hidden_size // (self.parallel.tensor_parallel_size * self.parallel.ulysses_size)
        per_token = 2 * width * self.bytes_per_weight

        def exchanged(rank: int) -> list[Traffic]:
            found = []
            for other in (place for place in range(ring) if place != rank):
                lent = len(shared_rows(boundaries, share, rank, other)) * per_token
                borrowed = len(shared_rows(boundaries, share, other, rank)) * per_token
                found.append(Traffic("attention", "ring", "send", 2 * blocks + again, lent, ring))
                found.append(Traffic("attention", "ring", "send", blocks, borrowed, ring))
            return found

        ranks = range(ring) if self.ring_rank is None else [self.ring_rank]
        yield from max((exchanged(rank) for rank in ranks), key=lambda found: sum(entry.sent for entry in found))

    def _modulation(self, term: str, rows: int, widths: int, times: int) -> Iterator[Traffic]:
        """Yield a modulation's: its table gathered, the table's gradient scattered, the condition's summed."""
        config, ranks = self.config, self.parallel.tensor_parallel_size
        table = rows * widths * config.hidden_size * self.bytes_per_weight
        condition = rows * config.time_embed_dim * self.bytes_per_weight
        yield Traffic(term, "tensor", "all_gather", times, table, ranks)
        yield Traffic(term, "tensor", "reduce_scatter", times, table, ranks)
        yield Traffic(term, "tensor", "all_reduce", times, condition, ranks)

    def _between_stages(self, tokens: int) -> Iterator[Traffic]:
        """Yield the tokens sent to the next stage and their gradient sent to the one before."""
        stages, share = self.parallel.pipeline_parallel_size, tokens // self.parallel.tensor_parallel_size
        times = int(self.stage < stages - 1) + int(self.stage > 0)
        yield Traffic(
            "stages", "pipeline", "send", times, share * self.config.hidden_size * self.bytes_per_weight, stages
        )


def gradient_buckets(sizes: Sequence[int], ranks: int, largest: int | None = None) -> list[int]:
    """Return the elements of each bucket of a gradient buffer, padding included.

    Each parameter starts at a multiple of 64, a bucket's size divides by the ranks and 128: megatron-core 0.16
    `param_and_grad_buffer.py`.

    Args:
        sizes: of the parameters, in the model's order; the buffer holds them in the order of their gradients.
        ranks: that share the buffer.
        largest: a bucket ends with the parameter that reaches so many elements; None makes one bucket.
    """
    multiple, found, used = math.lcm(ranks, BUFFER_ALIGNMENT), [], 0
    for size in reversed(sizes):
        used = _padded(used, PARAMETER_ALIGNMENT) + size
        if largest is not None and used >= largest:
            found.append(_padded(used, multiple))
            used = 0
    return [*found, _padded(used, multiple)] if used else found


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
