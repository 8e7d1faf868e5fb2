"""The ablations' blocks and attentions on two ranks equal one process, gradients too; or say that they can't run so."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megacogvx import draws
from megacogvx.errors import ConfigError
from megacogvx.pack_layout import build_layout, place_sample
from megacogvx.testing.spawn import on_ranks
from megacogvx.testing.tolerance import assert_all_close, assert_close

TP2, CP2 = {"tensor_parallel_size": 2}, {"context_parallel_size": 2}
SMALL = {
    "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16, "text_embed_dim": 24, "time_embed_dim": 32,
    "in_channels": 4, "out_channels": 4, "use_rotary_positional_embeddings": True,
}  # fmt: skip
SIZES = ((1, 8, 12, 3), (3, 8, 12, 7), (2, 8, 12, 5))  # the middle of the pack lies within the second sample's video
TIMESTEPS = (999, 400, 3, 0)


def _model(groups, **changes):
    from megacogvx.models.transformer import CogVideoXConfig, CogVideoXTransformer, transformer_core
    from megacogvx.parallel.config import ParallelConfig
    from megacogvx.parallel.tensor_parallel import full_shape, shard_of

    config = CogVideoXConfig(**SMALL, **changes)
    parallel = ParallelConfig(tensor_parallel_size=groups.tensor[1], context_parallel_size=groups.context[1])
    model = CogVideoXTransformer(config, transformer_core(config, parallel, groups, torch.float32), groups)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            shape = full_shape(tensor, groups)
            scale = 0.3 if len(shape) == 1 else shape[1] ** -0.5
            full = draws.normal(shape, 0, name) * scale + float("norm" in name and name.endswith("weight"))
            tensor.copy_(shard_of(full, tensor, groups))
    return model


def _run(model, groups):
    """Return this rank's rows and which of the pack's they are; a loss over them has left gradients."""
    config = model.config
    samples = [place_sample(place, *size, config.patch) for place, size in enumerate(SIZES)]
    layout = build_layout(samples, config.patch, multiple=32)
    local = layout.local(groups.tensor, groups.context)
    tokens = torch.arange(local.tokens.start, local.tokens.stop)
    widths = {"video": config.row_size_in, "text": config.text_embed_dim, "cotangent": config.row_size_out}
    drawn = {name: draws.normal((layout.num_tokens, width), 0, name)[tokens] for name, width in widths.items()}
    rows = model(drawn["video"][local.video_index], drawn["text"][local.text_index], torch.tensor(TIMESTEPS), layout)
    (rows * drawn["cotangent"][local.video_index]).sum().backward()
    return rows.detach(), tokens[local.video_index]


def _check(groups, **changes):
    from megacogvx.parallel.tensor_parallel import shard_of

    solo = [dist.new_group([rank]) for rank in range(groups.world_size)][groups.rank]
    alone = dataclasses.replace(
        groups, collection=SimpleNamespace(tp=solo, cp=solo, dp=solo, dp_cp=solo), tensor=(0, 1), context=(0, 1),
        data=(0, 1), rank=0, world_size=1,
    )  # fmt: skip
    reference, model = _model(alone, **changes), _model(groups, **changes)
    expected_rows, all_tokens = _run(reference, alone)
    rows, tokens = _run(model, groups)
    assert_close(rows, expected_rows[torch.isin(all_tokens, tokens)], 1e-5, str(changes))
    references, gradients = dict(reference.named_parameters()), {}
    for name, parameter in model.named_parameters():
        if getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(parameter.grad, group=groups.tensor_group)
        dist.all_reduce(parameter.grad, group=groups.context_group)
        gradients[name] = parameter.grad
    expected = {name: shard_of(references[name].grad, p, groups) for name, p in model.named_parameters()}
    assert_all_close(gradients, expected, 1e-4)


@on_ranks(2, TP2, CP2)
def test_shared_modulation_and_2d_1d_equal_one_process(groups):
    _check(groups, block="shared_adaln")
    _check(groups, attention="2d_1d")


@on_ranks(2, CP2)
def test_mmdit_over_context_ranks_equals_one_process(groups):
    _check(groups, block="mmdit")


@on_ranks(2, TP2)
def test_mmdit_over_tensor_ranks_is_refused(groups):
    with pytest.raises(ConfigError, match=r"model\.block=mmdit with parallel\.tensor_parallel_size=2"):
        _model(groups, block="mmdit")
