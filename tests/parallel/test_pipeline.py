"""The transformer on pipeline stages equals one process: losses, gradients, norm, weights, checkpoints."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megacogvx import draws
from megacogvx.pack_layout import build_layout, place_sample
from megacogvx.testing.spawn import on_ranks
from megacogvx.testing.tolerance import assert_all_close, assert_close

PP2 = {"pipeline_parallel_size": 2}
TP2 = {"tensor_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
SPLITS = {1: None, 2: (4, 1), 3: None}  # of five layers, by stages
LR, BETAS, EPS, CLIP = 1e-3, (0.9, 0.95), 1e-5, 0.5
MODEL = {
    "num_layers": 5, "num_attention_heads": 4, "attention_head_dim": 16, "text_embed_dim": 24, "time_embed_dim": 32,
    "max_text_seq_length": 7, "sample_height": 8, "sample_width": 12, "sample_frames": 9, "in_channels": 6,
    "out_channels": 4, "use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": True,
}  # fmt: skip
# Four packs of other samples each, all padded to the same number of tokens.
SIZES = (((1, 8, 12, 3), (2, 8, 12, 7)), ((2, 8, 12, 2),), ((3, 8, 12, 4),), ((1, 8, 12, 7), (1, 8, 12, 1)))
PACK_TOKENS = 96


def make(groups):
    from megacogvx.models.transformer import CogVideoXConfig, CogVideoXTransformer, transformer_core
    from megacogvx.parallel.config import ParallelConfig
    from megacogvx.parallel.tensor_parallel import full_shape, shard_of

    config = CogVideoXConfig(**MODEL)
    parallel = ParallelConfig(
        tensor_parallel_size=groups.tensor[1],
        context_parallel_size=groups.context[1],
        pipeline_parallel_size=groups.pipeline[1],
        pipeline_layers=SPLITS[groups.pipeline[1]],
    )
    model = CogVideoXTransformer(config, transformer_core(config, parallel, groups, torch.float32), groups)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            shape = full_shape(tensor, groups)
            scale = 0.3 if len(shape) == 1 else shape[1] ** -0.5
            full = draws.normal(shape, 0, name) * scale + float("norm" in name and name.endswith("weight"))
            tensor.copy_(shard_of(full, tensor, groups))
    return model.to(groups.device)


def alone(groups):
    """Groups of this rank by itself, for the reference."""
    solo = [dist.new_group([rank]) for rank in range(groups.world_size)][groups.rank]
    one = dict.fromkeys(("tensor", "context", "data", "pipeline"), (0, 1))
    collection = SimpleNamespace(tp=solo, cp=solo, dp=solo, dp_cp=solo, pp=solo)
    return dataclasses.replace(groups, collection=collection, rank=0, world_size=1, **one)


def forward_step(iterator, model):
    """As a training's: rows of one pack in, the squared error of this rank's rows out."""
    from megacogvx.parallel.data_parallel import unwrap

    place = next(iterator)
    bare = unwrap(model)
    config, groups = bare.config, bare.groups
    samples = [place_sample(number, *size, config.patch) for number, size in enumerate(SIZES[place])]
    layout = build_layout(samples, config.patch, num_tokens=PACK_TOKENS)
    local = layout.local(groups.tensor, groups.context, groups.device)

    def rows(width, what, index):
        everything = draws.normal((PACK_TOKENS, width), 0, what, place).to(groups.device)
        return everything[local.tokens.start : local.tokens.stop][index]

    out = model(
        rows(config.row_size_in, "video", local.video_index),
        rows(config.text_embed_dim, "text", local.text_index),
        torch.tensor([*(999, 400)[: len(samples)], 0], device=groups.device),
        layout,
    )
    target = rows(config.row_size_out, "target", local.video_index)
    count = len(layout.local((0, 1), groups.context).video_index)  # equal on the tensor ranks

    def loss_function(out):
        loss = ((out - target) ** 2).sum()
        return loss, torch.tensor(count, dtype=torch.int32), torch.tensor([loss.detach(), count / groups.tensor[1]])

    return out, loss_function


class Reference:
    """Some steps of torch's AdamW on one process."""

    def __init__(self, groups, steps=1):
        self.model = make(alone(groups))
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim == 1]
        parts = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(parts, lr=LR, betas=BETAS, eps=EPS)
        self.losses, self.norms = [], []
        for _ in range(steps):
            optimizer.zero_grad()
            packs = [forward_step(iter([place]), self.model) for place in range(len(SIZES))]
            results = [loss_function(out) for out, loss_function in packs]
            mean = sum(loss for loss, _, _ in results) / sum(int(count) for _, count, _ in results)
            mean.backward()
            self.losses.append(float(mean.detach()))
            self.gradients = {name: p.grad.clone() for name, p in self.model.named_parameters()}
            self.norms.append(float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)))
            optimizer.step()


def wrapped_with_optimizer(groups, overlap=False):
    from megacogvx.parallel.data_parallel import wrap
    from megacogvx.parallel.optimizer import build_optimizer

    model = make(groups)
    wrapped = wrap(model, model.core, groups, overlap=overlap)
    settings = {"lr": LR, "total_steps": 9, "decay": "constant", "betas": BETAS, "eps": EPS, "weight_decay": 0.1}
    return wrapped, build_optimizer(wrapped, groups, clip_grad=CLIP, **settings)


def forward_and_backward(wrapped, optimizer, groups, **options):
    """Return the loss over all ranks, as a training's loop reads it."""
    from megacogvx.parallel.data_parallel import forward_backward, sum_over_tokens
    from megacogvx.parallel.pipeline_parallel import from_last_stage

    mine = range(len(SIZES))[groups.data[0] :: groups.data[1]]
    optimizer.zero_grad()
    metrics = forward_backward(
        forward_step, mine, wrapped, groups, num_microbatches=len(mine), pack_tokens=PACK_TOKENS, **options
    )
    assert bool(metrics) == groups.is_last_stage
    total, count = sum_over_tokens(from_last_stage(sum(metrics) if metrics else None, groups), groups).tolist()
    return total / count


def whole_gradients(wrapped, groups):
    """Every gradient of this rank's parameters; each data and context rank has finished its share of each bucket."""
    group = groups.data_context_group
    for buffer in wrapped.buffers:
        for bucket in buffer.buckets:
            shares = list(bucket.grad_data.chunk(group.size()))
            dist.all_gather(shares, shares[group.rank()].clone(), group=group)
    return {name: parameter.main_grad.clone() for name, parameter in wrapped.module.named_parameters()}


def shards(whole, model, groups):
    """Of the reference's tensors, what this rank's parameters stand for."""
    from megacogvx.parallel.tensor_parallel import shard_of

    return {name: shard_of(whole[name], parameter, groups) for name, parameter in model.named_parameters()}


def assert_equals_one_process(groups, overlap=False):
    reference = Reference(groups)
    wrapped, optimizer = wrapped_with_optimizer(groups, overlap)
    names = {name for name, _ in wrapped.module.named_parameters()}
    assert ("head.proj.weight" in names) == groups.is_last_stage
    assert ("embedding.text_proj.weight" in names) == groups.is_first_stage

    without = forward_and_backward(wrapped, optimizer, groups, forward_only=True)
    assert abs(without / reference.losses[0] - 1) < 1e-5
    loss = forward_and_backward(wrapped, optimizer, groups)
    assert abs(loss / reference.losses[0] - 1) < 1e-5, (loss, reference.losses)
    gradients = whole_gradients(wrapped, groups)
    assert_all_close(gradients, shards(reference.gradients, wrapped.module, groups), 1e-4)
    taken, norm = optimizer.step()
    assert taken and abs(norm / reference.norms[0] - 1) < 1e-5, (norm, reference.norms)
    assert norm > CLIP
    weights = shards(dict(reference.model.named_parameters()), wrapped.module, groups)
    for name, parameter in wrapped.module.named_parameters():
        assert_close(parameter.detach(), weights[name].detach(), 1e-5, name)


@on_ranks(2, PP2)
def test_two_stages_equal_one_process(groups):
    assert groups.coordinates == f"dp0 pp{groups.rank} cp0 tp0"
    assert_equals_one_process(groups)


@on_ranks(3, {"pipeline_parallel_size": 3})
def test_three_uneven_stages_equal_one_process(groups):
    assert_equals_one_process(groups)


@on_ranks(4, {**TP2, **PP2}, {**CP2, **PP2}, PP2)
def test_stages_beside_other_axes_equal_one_process(groups):
    assert_equals_one_process(groups, overlap=groups.context[1] > 1)


@on_ranks(2, PP2)
def test_initial_weights_do_not_depend_on_the_split(groups):
    from megacogvx.models.transformer import initialize_weights

    reference, model = make(alone(groups)), make(groups)
    initialize_weights(reference, seed=3)
    initialize_weights(model, seed=3)
    whole = dict(reference.named_parameters())
    assert set(dict(model.named_parameters())) < set(whole)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, whole[name]), name


def load_and_step(path, groups):
    """Load on this layout; return the weights loaded, and loss and norm of the next step."""
    from megacogvx.checkpoint.distributed import load

    wrapped, optimizer = wrapped_with_optimizer(groups)
    with torch.no_grad():
        for parameter in wrapped.module.parameters():
            parameter.zero_()
    assert load(path, wrapped, optimizer, groups) == {"steps": 2}
    loaded = {name: parameter.detach().clone() for name, parameter in wrapped.module.named_parameters()}
    loss = forward_and_backward(wrapped, optimizer, groups)
    return wrapped, loaded, loss, optimizer.step()[1]


def switch(layout):
    """Take the process groups down and make those of `layout`; the processes stay."""
    from megacogvx.parallel import groups as parallel_groups
    from megacogvx.parallel.config import ParallelConfig

    parallel_groups.shutdown(stay_connected=True)
    return parallel_groups.initialize(ParallelConfig(timeout_minutes=2.0, **layout))


@on_ranks(2, PP2)
def test_checkpoints_change_the_number_of_stages(groups, folder):
    from megacogvx.checkpoint.directory import CheckpointDirectory
    from megacogvx.checkpoint.distributed import save

    reference = Reference(groups, steps=3)
    wrapped, optimizer = wrapped_with_optimizer(groups)
    for _ in range(2):
        forward_and_backward(wrapped, optimizer, groups)
        optimizer.step()
    path = save(CheckpointDirectory(folder), 2, wrapped, optimizer, {"steps": 2}, groups)
    saved = {name: parameter.detach().clone() for name, parameter in wrapped.module.named_parameters()}

    def check(other, wrapped, loaded, loss, norm):
        expected = shards(saved, SimpleNamespace(named_parameters=lambda: own(wrapped)), other)
        assert all(torch.equal(loaded[name], value) for name, value in expected.items())
        assert abs(loss / reference.losses[2] - 1) < 1e-5 and abs(norm / reference.norms[2] - 1) < 1e-5
        weights = shards(dict(reference.model.named_parameters()), wrapped.module, other)
        for name, parameter in wrapped.module.named_parameters():
            assert_close(parameter.detach(), weights[name].detach(), 1e-5, name)

    def own(wrapped):
        """Parameters that this rank's stage had saved."""
        return [(name, parameter) for name, parameter in wrapped.module.named_parameters() if name in saved]

    if groups.is_first:
        places = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
        environment = {name: value for name, value in os.environ.items() if name not in places}
        subprocess.run([sys.executable, __file__, str(path)], check=True, env=environment)
    dist.barrier()
    single = torch.load(path.parent / "alone.pt")
    assert all(torch.equal(single["loaded"][name], value) for name, value in saved.items())
    assert abs(single["loss"] / reference.losses[2] - 1) < 1e-5
    for layout in (PP2, TP2, {}):
        other = switch(layout)
        check(other, *load_and_step(path, other))
    # and from one stage back to two
    last = save(CheckpointDirectory(folder / "whole"), 3, *wrapped_with_optimizer(other), {"steps": 2}, other)
    load_and_step(last, switch(PP2))


def alone_from_checkpoint(path):
    from megacogvx.parallel import groups as parallel_groups
    from megacogvx.parallel.config import ParallelConfig

    groups = parallel_groups.initialize(ParallelConfig(device="cpu"))
    _, loaded, loss, _ = load_and_step(path, groups)
    torch.save({"loaded": loaded, "loss": loss}, path.parent / "alone.pt")
    parallel_groups.shutdown()


@on_ranks(2, PP2)
def test_a_stage_says_when_it_received_nothing(groups):
    model = make(groups)
    if not groups.is_first_stage:
        with pytest.raises(AssertionError, match="without the schedule"):
            forward_step(iter([0]), model)


if __name__ == "__main__":
    alone_from_checkpoint(Path(sys.argv[1]))
