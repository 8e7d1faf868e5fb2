"""The transformer on two ranks (tensor and sequence parallel; context parallel) equals one process, gradients too."""

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

LAYOUTS = ({"tensor_parallel_size": 2}, {"context_parallel_size": 2})
OUTPUT_BOUND, GRADIENT_BOUND = 1e-5, 1e-4
SMALL = {
    "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16, "text_embed_dim": 24, "time_embed_dim": 32,
    "max_text_seq_length": 7, "sample_height": 8, "sample_width": 12, "sample_frames": 9, "in_channels": 6,
    "out_channels": 4,
}  # fmt: skip
ROTARY = {"use_rotary_positional_embeddings": True}
VARIANTS = {
    "2b": {},
    "5b_i2v": {**ROTARY, "use_learned_positional_embeddings": True},
    "1_5_i2v": {**ROTARY, "patch_size_t": 2, "ofs_embed_dim": 32},
}
# The middle of the pack lies within the second sample's video, and its end is padding, for either temporal patch.
SIZES = ((1, 8, 12, 3), (3, 8, 12, 7), (2, 8, 12, 5))
TIMESTEPS = (999, 400, 3, 0)


def _model(variant, groups, recompute="none"):
    from megacogvx.models.transformer import CogVideoXConfig, CogVideoXTransformer, transformer_core
    from megacogvx.parallel.config import ParallelConfig
    from megacogvx.parallel.tensor_parallel import full_shape, shard_of

    config = CogVideoXConfig(**SMALL, **VARIANTS[variant])
    parallel = ParallelConfig(
        tensor_parallel_size=groups.tensor[1], context_parallel_size=groups.context[1], recompute=recompute
    )
    model = CogVideoXTransformer(config, transformer_core(config, parallel, groups, torch.float32), groups)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            shape = full_shape(tensor, groups)
            scale = 0.3 if len(shape) == 1 else shape[1] ** -0.5
            full = draws.normal(shape, 0, name) * scale + float("norm" in name and name.endswith("weight"))
            tensor.copy_(shard_of(full, tensor, groups))
    return model.to(groups.device)


def _alone(groups):
    """Groups of this rank by itself, for the reference."""
    solos = [dist.new_group([rank]) for rank in range(groups.world_size)]
    solo = solos[groups.rank]
    collection = SimpleNamespace(tp=solo, cp=solo, dp=solo, dp_cp=solo)
    return dataclasses.replace(
        groups, collection=collection, tensor=(0, 1), context=(0, 1), data=(0, 1), rank=0, world_size=1
    )


def _run(model, groups):
    """Return this rank's rows, all of the pack's rows that they are, and the gradients of a loss over them."""
    config = model.config
    samples = [place_sample(place, *size, config.patch) for place, size in enumerate(SIZES)]
    layout = build_layout(samples, config.patch, multiple=32)
    local = layout.local(groups.tensor, groups.context, groups.device)
    tokens = torch.arange(local.tokens.start, local.tokens.stop)
    video = draws.normal((layout.num_tokens, config.row_size_in), 0, "video")[tokens].to(groups.device)
    text = draws.normal((layout.num_tokens, config.text_embed_dim), 0, "text")[tokens].to(groups.device)
    cotangent = draws.normal((layout.num_tokens, config.row_size_out), 0, "cotangent")[tokens].to(groups.device)
    rows = model(
        video[local.video_index], text[local.text_index], torch.tensor(TIMESTEPS, device=groups.device), layout
    )
    (rows * cotangent[local.video_index]).sum().backward()
    return rows.detach(), tokens[local.video_index.cpu()]


def _finished_gradients(model, groups):
    """Finish the gradients as megatron-core does: sums of those marked over tensor ranks, of all over context ranks."""
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(gradient, group=groups.tensor_group)
        dist.all_reduce(gradient, group=groups.context_group)
        gradients[name] = gradient
    return gradients


def _compare(variant, groups, recompute="none"):
    from megacogvx.parallel.tensor_parallel import shard_of

    alone = _alone(groups)
    reference, model = _model(variant, alone), _model(variant, groups, recompute)
    expected_rows, all_tokens = _run(reference, alone)
    rows, tokens = _run(model, groups)

    expected_here = expected_rows[torch.isin(all_tokens, tokens).to(expected_rows.device)]
    assert_close(rows, expected_here, OUTPUT_BOUND, f"rows of {variant}")
    gradients = _finished_gradients(model, groups)
    parameters, references = dict(model.named_parameters()), dict(reference.named_parameters())
    expected = {name: shard_of(references[name].grad, parameters[name], groups) for name in parameters}
    if variant == "2b":  # without rotation a bias common to all keys cancels in the softmax; only rounding is left
        for name in [name for name in expected if name.endswith("k_norm.bias")]:
            del gradients[name], expected[name]
    assert_all_close(gradients, expected, GRADIENT_BOUND)


@on_ranks(2, *LAYOUTS)
def test_rotary_learned_and_offset_equal_one_process(groups):
    _compare("5b_i2v", groups)
    _compare("1_5_i2v", groups)


@on_ranks(2, *LAYOUTS)
def test_sine_positions_equal_one_process(groups):
    _compare("2b", groups)


@on_ranks(2, *LAYOUTS)
def test_recompute_changes_no_bit(groups):
    results = {}
    for policy in ("none", "selective", "keep_attention", "full", "block:1"):
        model = _model("1_5_i2v", groups, policy)
        rows, _ = _run(model, groups)
        results[policy] = {"rows": rows, **{name: parameter.grad for name, parameter in model.named_parameters()}}
    for policy, result in results.items():
        assert all(torch.equal(result[name], value) for name, value in results["none"].items()), policy


@on_ranks(2, *LAYOUTS)
def test_initial_weights_are_cut_from_the_same_tensors(groups):
    from megacogvx.models.transformer import initialize_weights
    from megacogvx.parallel.tensor_parallel import full_shape, is_cut, shard_of

    reference, model = _model("5b_i2v", _alone(groups)), _model("5b_i2v", groups)
    initialize_weights(reference, seed=3)
    initialize_weights(model, seed=3)
    whole = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert full_shape(parameter, groups) == whole[name].shape
        assert torch.equal(parameter, shard_of(whole[name], parameter, groups)), name
    assert groups.tensor[1] == 1 or any(is_cut(parameter) for parameter in model.parameters())


@on_ranks(2, *LAYOUTS)
def test_checkpoint_names_and_cuts_fit_one_process(groups):
    reference, model = _model("5b_i2v", _alone(groups)), _model("5b_i2v", groups)
    whole, sharded = reference.state_dict(), model.sharded_state_dict()
    assert sharded.keys() == {name for name, tensor in whole.items() if tensor is not None}
    for name, part in sharded.items():
        assert part.global_shape == tuple(whole[name].shape), name
        slices = tuple(slice(o, o + n) for o, n in zip(part.global_offset, part.local_shape, strict=True))
        assert torch.equal(part.data, whole[name][slices]), name


@on_ranks(2, LAYOUTS[0])
def test_a_pack_that_cannot_be_cut_is_refused(groups):
    model = _model("2b", groups)
    layout = build_layout([place_sample(0, 1, 2, 2, 4, model.config.patch)], model.config.patch)
    with pytest.raises(ConfigError, match="5 tokens"):
        model(torch.zeros(1, model.config.row_size_in), torch.zeros(4, 24), torch.zeros(2, dtype=torch.int64), layout)
