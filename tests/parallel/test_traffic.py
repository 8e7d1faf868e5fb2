"""A real step on two ranks exchanges exactly what `megacogvx estimate` says, tensor by tensor."""

from __future__ import annotations

from collections import Counter
from functools import partial
from unittest.mock import patch

import torch

from megacogvx import draws
from megacogvx.pack_layout import build_layout, place_sample
from megacogvx.testing.spawn import on_ranks

SMALL = {
    "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16, "text_embed_dim": 24, "time_embed_dim": 32,
    "max_text_seq_length": 7, "use_rotary_positional_embeddings": True,
}  # fmt: skip
SIZES = ((1, 8, 12, 3), (3, 8, 12, 7), (2, 8, 12, 5))
AXES = {
    "tensor": "tensor_group", "context": "context_group", "data_context": "data_context_group",
    "pipeline": "pipeline_group", "ring": "ring_group",
}  # fmt: skip


def _step(groups, parallel, dtype, packs):
    """Take one optimizer step on `packs` packs; return the model, its layouts, and what this rank exchanged."""
    from megacogvx.models.transformer import CogVideoXConfig, CogVideoXTransformer, transformer_core
    from megacogvx.parallel.data_parallel import forward_backward, wrap
    from megacogvx.parallel.optimizer import build_optimizer
    from megacogvx.testing.traffic import CountedTraffic

    config = CogVideoXConfig(**SMALL)
    core = transformer_core(config, parallel, groups, dtype)
    model = CogVideoXTransformer(config, core, groups)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(draws.normal(tuple(parameter.shape), 0, name) * 0.1)
    ddp = wrap(model, core, groups, overlap=parallel.overlap_grad_reduce)
    optimizer = build_optimizer(ddp, groups, lr=1e-3, total_steps=2)
    samples = [place_sample(place, *size, config.patch) for place, size in enumerate(SIZES)]
    tokens = 32 * 8 if groups.pipeline[1] > 1 else None  # stages have to know the length of what they receive
    layouts = [build_layout(samples[: 1 + place % 3], config.patch, tokens, multiple=32) for place in range(packs)]

    def forward(iterator, model):
        layout = next(iterator)
        local, device = layout.local(groups.tensor, groups.context), groups.device
        video = torch.ones(len(local.video_index), config.row_size_in, dtype=dtype, device=device)
        text = torch.ones(len(local.text_index), config.text_embed_dim, dtype=dtype, device=device)
        rows = model(video, text, torch.zeros(layout.num_samples, dtype=torch.int64, device=device), layout)
        return rows, lambda rows: (rows.float().pow(2).sum(), torch.ones((), dtype=torch.int32, device=device), {})

    with CountedTraffic() as counted:
        forward_backward(forward, layouts, ddp, groups, num_microbatches=packs, pack_tokens=tokens or 1)
        optimizer.step()
    return config, model, layouts, counted.exchanges


def _compare(groups, recompute="none", dtype=torch.float32, packs=2, overlap=False):
    from megacogvx.parallel.config import ParallelConfig
    from megacogvx.training.estimate.communication import SUMMED, communication
    from megacogvx.training.estimate.parameters import stage_weights

    parallel = ParallelConfig(
        tensor_parallel_size=groups.tensor[1], context_parallel_size=groups.context[1],
        ring_size=groups.ring[1], pipeline_parallel_size=groups.pipeline[1], recompute=recompute,
        overlap_grad_reduce=overlap,
    )  # fmt: skip
    stage = groups.pipeline[0]
    config, model, layouts, exchanges = _step(groups, parallel, dtype, packs)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    expected = {weight.name: weight.local_shape(groups.tensor[1]) for weight in stage_weights(config, parallel, stage)}
    assert list(shapes.items()) == list(expected.items())

    predicted = communication(
        config, parallel, layouts, stage=stage, data_size=groups.data[1], bytes_per_weight=dtype.itemsize,
        ring_rank=groups.ring[0],
    )  # fmt: skip
    used = {entry.axis for entry in predicted} - {"all"}
    ranks = {axis: tuple(torch.distributed.get_process_group_ranks(getattr(groups, AXES[axis]))) for axis in used}
    ranks["all"] = tuple(range(groups.world_size))
    wanted, summed = Counter(), 0
    for entry in predicted:
        if entry.term.endswith(f" {SUMMED}"):
            summed += entry.tensor_bytes
        else:
            wanted[entry.collective, ranks[entry.axis], entry.tensor_bytes] += entry.times
    if summed:
        wanted["all_reduce", ranks["tensor"], summed] += 1
    exchanges = Counter({key: times for key, times in exchanges.items() if len(key[1]) > 1})
    assert exchanges == wanted, f"{recompute}: counted {exchanges - wanted} more, {wanted - exchanges} less"


RING = {"context_parallel_size": 2, "ring_size": 2}


@on_ranks(2, {"tensor_parallel_size": 2}, {"context_parallel_size": 2}, {}, {"pipeline_parallel_size": 2}, RING)
def test_a_step_exchanges_what_the_closed_form_says(groups):
    _compare(groups)
    _compare(groups, dtype=torch.bfloat16, packs=1)


@on_ranks(2, {})
def test_gradients_that_overlap_travel_in_buckets(groups):
    """Buckets of 20,000 elements, of which this small model fills several, as large ones do with megatron-core's."""
    from megacogvx.parallel import data_parallel
    from megacogvx.training.estimate import communication

    small = partial(data_parallel.DistributedDataParallelConfig, bucket_size=20_000)
    with (
        patch.object(data_parallel, "DistributedDataParallelConfig", small),
        patch.multiple(communication, BUCKET_ELEMENTS=20_000, BUCKET_ELEMENTS_PER_RANK=1),
    ):
        _compare(groups, overlap=True)


@on_ranks(2, {"tensor_parallel_size": 2}, {"context_parallel_size": 2}, RING)
def test_recompute_exchanges_again_what_it_runs_again(groups):
    for policy in ("selective", "keep_attention", "full", "block:1"):
        _compare(groups, policy, packs=1)
