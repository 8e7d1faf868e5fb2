"""Bytes that one rank keeps: weights, gradients, optimizer states, and the activations that autograd saves.

The two inventories say what a block's ops keep for each token, in multiples of D. `REFERENCE` is what the plain
definitions of `megacogvx_kernels` keep, as autograd records it; `FUSED` is one pass per op with its statistics, as
the CUDA ops and a flash attention keep it (32 D, 24 D and 4 D bytes a token in bf16 for "none", "selective" and
"keep_attention"; Korthikanti et al. 2022, section 4 counts a language model's block the same way). GELU's output is
kept by Transformer Engine's layers alone, 8 D bytes more for "none".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megacogvx.models.transformer.config import CogVideoXConfig
from megacogvx.pack_layout import PackLayout
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.pipeline_parallel import split_layers
from megacogvx.training.ema import deal
from megacogvx.training.estimate.parameters import local_sizes

Ops = Literal["reference", "fused"]
FP32 = 4  # bytes
SELECTIVE, KEEP = "selective", "keep_attention"


@dataclass(frozen=True)
class Kept:
    """Something that a block keeps for its backward pass.

    Attributes:
        name: what it is.
        widths: its size per token, in multiples of D.
        absent: the recompute policies that don't keep it; "full" keeps the block's input alone.
        fp32: where nothing is recomputed it is kept in fp32, whatever the weights' dtype is.
        only_bf16: a copy that fp32 weights don't need.
        only_split: a copy that the exchange between context ranks leaves.
        only_te: kept by Transformer Engine's linear layers; ours compute it again.
    """

    name: str
    widths: float
    absent: tuple[str, ...] = (KEEP,)
    fp32: bool = False
    only_bf16: bool = False
    only_split: bool = False
    only_te: bool = False


_BOTH = (SELECTIVE, KEEP)
FUSED = (
    Kept("block's input", 1, absent=()),
    Kept("modulated tokens, read by qkv", 1, _BOTH),
    Kept("q, k and v before the norm", 3),
    Kept("q and k, rotated", 2, _BOTH),
    Kept("v, exchanged", 1, only_split=True),
    Kept("attention's output", 1, absent=()),
    Kept("attention's output, exchanged", 1, only_split=True),
    Kept("attention's projection, read by the gate", 1),
    Kept("second norm's input", 1),
    Kept("modulated tokens, read by fc1", 1, _BOTH),
    Kept("fc1's output", 4),
    Kept("GELU's output, read by fc2", 4, _BOTH, only_te=True),
    Kept("fc2's output, read by the gate", 1),
)
REFERENCE = (
    Kept("block's input", 1, absent=(), fp32=True),
    Kept("first norm's output and scale", 2, _BOTH, fp32=True),
    Kept("modulated tokens, read by qkv", 1, _BOTH),
    Kept("q, k and v before the norm", 3),
    Kept("copies of q and k", 2, _BOTH, fp32=True, only_bf16=True),
    Kept("q and k, rotated", 2, _BOTH),
    Kept("v, exchanged", 1, only_split=True),
    Kept("attention's output", 1, absent=()),
    Kept("attention's projection, read by the gate", 1, fp32=True),
    Kept("first gate, spread over tokens", 1, _BOTH, fp32=True),
    Kept("second norm's input", 1, fp32=True),
    Kept("second norm's output and scale", 2, _BOTH, fp32=True),
    Kept("modulated tokens, read by fc1", 1, _BOTH),
    Kept("fc1's output", 4),
    Kept("GELU's output, read by fc2", 4, _BOTH, only_te=True),
    Kept("second gate, spread over tokens", 1, _BOTH, fp32=True),
    Kept("fc2's output, read by the gate", 1, fp32=True),
)
# Per video token of the head, in multiples of D: (in the weights' dtype, in fp32).
_HEAD = {"fused": (3, 0), "reference": (2, 3)}


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, by part.

    Attributes:
        weights, gradients, optimizer: of the rank's parameters; the states of AdamW and the fp32 weights lie on the
            data x context ranks, a share on each.
        activations: what autograd keeps of all packs in flight.
        at_work: what one block needs on top of it while its backward pass runs.
        reserve: CUDA context, NCCL, allocator.
        average: of the weights (`ema.decay`), fp32; the data x context ranks share whole tensors, evenly but for one.
        frozen: encoders that take part in training, whole on each rank of the first stage.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    at_work: int
    reserve: int
    average: int = 0
    frozen: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        kept = self.weights + self.gradients + self.optimizer + self.average + self.frozen
        return kept + self.activations + self.at_work + self.reserve


def memory(
    config: CogVideoXConfig, parallel: ParallelConfig, layout: PackLayout, *,
    stage: int, data_size: int, packs_per_replica: int, bytes_per_weight: int, ops: Ops, reserve: int = 0,
    averages: bool = False, frozen: int = 0,
) -> Memory:  # fmt: skip
    """Return what a rank of pipeline stage `stage` holds at its fullest.

    Args:
        config, parallel: sections `model` and `parallel`.
        layout: a pack.
        stage: the pipeline stage.
        data_size: data-parallel replicas.
        packs_per_replica: packs of a step that one replica computes; with stages, several are in flight (1F1B).
        bytes_per_weight: 2 for bf16, 4 for fp32.
        ops: whose inventory counts.
        reserve: bytes that are no tensors.
        averages: whether the run keeps averaged weights.
        frozen: parameters of frozen encoders.
    """
    stages = parallel.pipeline_parallel_size
    in_flight = min(packs_per_replica, stages - stage)
    count = len(stage_layers(config, parallel, stage))
    again = int(parallel.recompute.removeprefix("block:")) if parallel.recompute.startswith("block:") else 0
    # blocks are equal, but for the first few of "block:N"
    first, last = (
        block_activations(config, parallel, layout, place, bytes_per_weight, ops) for place in (0, count - 1)
    )
    blocks = min(again, count) * first + (count - min(again, count)) * last
    ends = end_activations(config, parallel, layout, stage, bytes_per_weight, ops)
    return Memory(
        **static_memory(sum(local_sizes(config, parallel, stage)), parallel, data_size, bytes_per_weight),
        activations=in_flight * (blocks + ends),
        at_work=_at_work(config, parallel, layout, bytes_per_weight, ops, min(first, last)),
        reserve=reserve,
        average=average_memory(local_sizes(config, parallel, stage), parallel, data_size) if averages else 0,
        frozen=frozen * bytes_per_weight if stage == 0 else 0,
    )


def stage_layers(config: CogVideoXConfig, parallel: ParallelConfig, stage: int) -> range:
    """Return the layers of one pipeline stage."""
    return split_layers(config.num_layers, parallel.pipeline_parallel_size, parallel.pipeline_layers)[stage]


def static_memory(count: int, parallel: ParallelConfig, data_size: int, bytes_per_weight: int) -> dict[str, int]:
    """Return bytes of weights, gradients (fp32) and optimizer states (fp32 moments; fp32 weights beside bf16 ones).

    Args:
        count: parameters that the rank holds.
        parallel: section `parallel`.
        data_size: data-parallel replicas.
        bytes_per_weight: 2 for bf16, 4 for fp32.
    """
    shares = data_size * parallel.context_parallel_size
    states = 2 * FP32 + (FP32 if bytes_per_weight < FP32 else 0)
    return {"weights": count * bytes_per_weight, "gradients": count * FP32, "optimizer": -(-count * states // shares)}


def average_memory(sizes: Sequence[int], parallel: ParallelConfig, data_size: int) -> int:
    """Return the bytes of averaged weights on the rank that keeps most; dealt as `training.ema` deals them.

    Args:
        sizes: elements of each tensor that the ranks hold.
        parallel: section `parallel`.
        data_size: data-parallel replicas.
    """
    owners = deal({str(place): size for place, size in enumerate(sizes)}, data_size * parallel.context_parallel_size)
    held: Counter[int] = Counter()
    for place, size in enumerate(sizes):
        held[owners[str(place)]] += size
    return FP32 * max(held.values())


def block_activations(
    config: CogVideoXConfig, parallel: ParallelConfig, layout: PackLayout, place: int, bytes_per_weight: int, ops: Ops
) -> int:
    """Return the bytes that one block keeps of one pack on one rank; `place`: among the blocks of its stage."""
    policy = parallel.recompute
    if policy.startswith("block:"):
        policy = "full" if place < int(policy.removeprefix("block:")) else "none"
    tokens = layout.num_tokens / parallel.stage_size
    tables = 2 * layout.num_samples * 6 * config.hidden_size * bytes_per_weight
    return round(tokens * _bytes_per_token(config, parallel, policy, bytes_per_weight, ops)) + tables


def _bytes_per_token(
    config: CogVideoXConfig, parallel: ParallelConfig, policy: str, bytes_per_weight: int, ops: Ops
) -> float:
    width = config.hidden_size
    if policy == "full":
        return width * bytes_per_weight
    kept = sum(
        entry.widths * width * (FP32 if entry.fp32 and policy == "none" else bytes_per_weight)
        for entry in (FUSED if ops == "fused" else REFERENCE)
        if policy not in entry.absent
        and not (entry.only_bf16 and bytes_per_weight == FP32)
        and not (entry.only_split and parallel.context_parallel_size == 1)
        and not (entry.only_te and parallel.transformer_impl == "local")
    )
    heads = config.num_attention_heads
    statistics = heads * FP32  # attention's log-sum-exp
    if policy == "none" or (policy == SELECTIVE and ops == "fused"):
        statistics += 4 * heads * FP32 + 4 * FP32  # mean and deviation of q, of k, and of the two norms
    if policy == "none" and ops == "reference":
        statistics += 2 * config.attention_head_dim * FP32 * parallel.tensor_parallel_size  # cosines and sines
    return kept + statistics


def end_activations(
    config: CogVideoXConfig, parallel: ParallelConfig, layout: PackLayout, stage: int, bytes_per_weight: int, ops: Ops
) -> int:
    """Return the bytes that embedding, head and loss keep of one pack on one rank of a stage, evenly cut."""
    ranks, width = parallel.stage_size, config.hidden_size
    video = sum(sample.video_length for sample in layout.samples)
    text = layout.num_tokens - video
    kept = 0
    if stage == 0:  # rows that the projections read
        kept += bytes_per_weight * (video * config.row_size_in + text * config.text_embed_dim)
    if stage == parallel.pipeline_parallel_size - 1:
        narrow, wide = _HEAD[ops]
        kept += video * (width * (narrow * bytes_per_weight + wide * FP32) + config.row_size_out * FP32)
    return round(kept / ranks)


def _at_work(
    config: CogVideoXConfig, parallel: ParallelConfig, layout: PackLayout, bytes_per_weight: int, ops: Ops, kept: int
) -> int:
    """Return what one block's backward pass needs: what it makes again, and the two widest gradients."""
    tokens = layout.num_tokens / parallel.stage_size
    whole = tokens * _bytes_per_token(config, parallel, "none", bytes_per_weight, ops)
    gradients = tokens * 2 * config.ffn_hidden_size * bytes_per_weight
    return round(max(0.0, whole - kept) + gradients)
