"""A small transformer, four packs and one optimizer step: on one process with torch alone, and on any layout.

What a layout computes is held to what one process computes: the predicted rows, the losses, every gradient and its
norm, the weights after the step. For tests of layouts; both sides draw the same numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megacogvx import draws
from megacogvx.models.transformer.config import CogVideoXConfig
from megacogvx.models.transformer.model import CogVideoXTransformer, transformer_core
from megacogvx.pack_layout import build_layout, place_sample
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.data_parallel import (
    DistributedDataParallel,
    forward_backward,
    sum_over_tokens,
    unwrap,
    wrap,
)
from megacogvx.parallel.groups import ParallelGroups
from megacogvx.parallel.optimizer import Optimizer, build_optimizer
from megacogvx.parallel.pipeline_parallel import from_last_stage
from megacogvx.parallel.tensor_parallel import full_shape, shard_of
from megacogvx.testing.tolerance import assert_all_close, assert_close

_SMALL = {
    "num_layers": 3, "num_attention_heads": 4, "attention_head_dim": 16, "text_embed_dim": 24, "time_embed_dim": 32,
    "max_text_seq_length": 7, "sample_height": 8, "sample_width": 12, "sample_frames": 9, "in_channels": 6,
    "out_channels": 4,
}  # fmt: skip
_ROTARY = {"use_rotary_positional_embeddings": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "2b": {},
    "5b": {**_ROTARY},
    "5b_i2v": {**_ROTARY, "use_learned_positional_embeddings": True},
    "1_5_i2v": {**_ROTARY, "patch_size_t": 2, "ofs_embed_dim": 32},
}
# (latent frames, height, width, text tokens) of the samples of four packs, all padded to the same number of tokens.
SIZES = (((1, 8, 12, 3), (2, 8, 12, 7)), ((2, 8, 12, 2),), ((3, 8, 12, 4),), ((1, 8, 12, 7), (1, 8, 12, 1)))
TIMESTEPS = (999, 400)
PACK_TOKENS = 96
LR, BETAS, EPS, CLIP, DECAY = 1e-3, (0.9, 0.95), 1e-5, 0.5, 0.1
LOSS_SCALE = 8.0  # of fp16: no gradient of these packs overflows


@dataclass(frozen=True)
class Setting:
    """What is computed, whatever the layout.

    Attributes:
        variant: of `VARIANTS`.
        dtype: of the weights; the reference computes with the same rounded weights in fp32.
        recompute: `parallel.recompute`.
        overlap: gradients are reduced during the backward pass.
        changes: of the model's config.
    """

    variant: str = "5b_i2v"
    dtype: torch.dtype = torch.float32
    recompute: str = "none"
    overlap: bool = False
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> CogVideoXConfig:
        """The model's config."""
        return CogVideoXConfig(**{**_SMALL, **VARIANTS[self.variant], **self.changes})

    @property
    def unmeasured(self) -> tuple[str, ...]:
        """Ends of the names of parameters whose true gradient is zero, so that rounding alone is left.

        Without rotation a bias common to all keys cancels in the softmax.
        """
        return ("k_norm.bias",) if self.variant == "2b" else ()


def make(groups: ParallelGroups, setting: Setting) -> CogVideoXTransformer:
    """Return the model with non-trivial weights, each drawn in full from its name and then cut."""
    parallel = ParallelConfig(
        tensor_parallel_size=groups.tensor[1],
        context_parallel_size=groups.context[1],
        ring_size=groups.ring[1],
        pipeline_parallel_size=groups.pipeline[1],
        pipeline_layers=uneven(setting.config.num_layers, groups.pipeline[1]),
        recompute=setting.recompute,
    )
    core = transformer_core(setting.config, parallel, groups, setting.dtype)
    model = CogVideoXTransformer(setting.config, core, groups)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            shape = full_shape(tensor, groups)
            scale = 0.3 if len(shape) == 1 else shape[1] ** -0.5
            full = draws.normal(shape, 0, name) * scale + float("norm" in name and name.endswith("weight"))
            tensor.copy_(shard_of(full, tensor, groups))
    return model.to(groups.device)


def uneven(layers: int, stages: int) -> tuple[int, ...]:
    """Return how many layers each stage holds: one each, the first the rest."""
    return (layers - stages + 1, *[1] * (stages - 1))


def alone(groups: ParallelGroups) -> ParallelGroups:
    """Return groups of this rank by itself, for the reference; every rank calls it."""
    solo = [dist.new_group([rank]) for rank in range(groups.world_size)][groups.rank]
    one: dict[str, Any] = dict.fromkeys(("tensor", "context", "data", "pipeline", "ring"), (0, 1))
    collection: Any = SimpleNamespace(tp=solo, cp=solo, dp=solo, dp_cp=solo, pp=solo)
    return dataclasses.replace(groups, collection=collection, rank=0, world_size=1, **one)


def forward_step(iterator: Iterator[int], model: nn.Module) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
    """As a training's: rows of one pack in, the squared error of this rank's rows out.

    The metrics are this rank's share of (loss, divisor), its predicted rows, and which of the pack's tokens they are.
    """
    place = next(iterator)
    bare: Any = unwrap(model)
    config, groups, dtype = bare.config, bare.groups, next(bare.parameters()).dtype
    samples = [place_sample(number, *size, config.patch) for number, size in enumerate(SIZES[place])]
    layout = build_layout(samples, config.patch, num_tokens=PACK_TOKENS)
    local = layout.local(groups.tensor, groups.context, groups.device)
    tokens = torch.arange(local.tokens.start, local.tokens.stop)

    def rows(width: int, what: str, index: torch.Tensor) -> torch.Tensor:
        return draws.normal((PACK_TOKENS, width), 0, what, place)[tokens].to(groups.device)[index]

    out = model(
        rows(config.row_size_in, "video", local.video_index).to(dtype),
        rows(config.text_embed_dim, "text", local.text_index).to(dtype),
        torch.tensor([*TIMESTEPS[: len(samples)], 0], device=groups.device),
        layout,
    )
    target = rows(config.row_size_out, "target", local.video_index)
    count = len(layout.local((0, 1), groups.context).video_index)  # equal on the tensor ranks

    def loss_function(out: torch.Tensor) -> Any:
        loss = ((out.float() - target) ** 2).sum()
        sums = torch.stack([loss.detach().clone(), torch.full_like(loss, count / groups.tensor[1])])
        divisor = torch.tensor(count, dtype=torch.int32, device=groups.device)
        return loss, divisor, (sums, out.detach().clone(), tokens[local.video_index.cpu()])

    return out, loss_function


class Reference:
    """Some steps of torch's AdamW in fp32 on one process, all packs of a step together.

    Attributes:
        rows: predicted rows of each pack, and which of its tokens they are; of the last step.
        losses, norms: of each step, the norms before clipping.
        gradients: of the last step, before clipping.
        model: the weights after it.
    """

    def __init__(self, groups: ParallelGroups, setting: Setting, steps: int = 1) -> None:
        plain = dataclasses.replace(setting, dtype=torch.float32, recompute="none")
        self.model = make(alone(groups), plain)
        if setting.dtype != torch.float32:
            for parameter in self.model.parameters():
                parameter.data = parameter.data.to(setting.dtype).float()
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim == 1]
        parts = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(parts, lr=LR, betas=BETAS, eps=EPS)
        self.losses, self.norms = [], []
        for _ in range(steps):
            optimizer.zero_grad()
            packs = [forward_step(iter([place]), self.model) for place in range(len(SIZES))]
            results = [loss_function(out) for out, loss_function in packs]
            self.rows = [(rows, tokens) for _, _, (_, rows, tokens) in results]
            mean = sum(loss for loss, _, _ in results) / sum(int(count) for _, count, _ in results)
            mean.backward()
            self.losses.append(float(mean.detach()))
            self.gradients = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
            self.norms.append(float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)))
            optimizer.step()


def wrapped_with_optimizer(
    groups: ParallelGroups, setting: Setting, **options: Any
) -> tuple[DistributedDataParallel, Optimizer]:
    """Return the model on this layout as a training has it; `options` of `build_optimizer` win."""
    model = make(groups, setting)
    wrapped = wrap(model, model.core, groups, overlap=setting.overlap)
    settings: dict[str, Any] = {
        "lr": LR, "total_steps": 9, "decay": "constant", "betas": BETAS, "eps": EPS, "weight_decay": DECAY,
        "clip_grad": CLIP, "initial_loss_scale": LOSS_SCALE,
    }  # fmt: skip
    return wrapped, build_optimizer(wrapped, groups, **{**settings, **options})


def forward_and_backward(
    wrapped: DistributedDataParallel, optimizer: Optimizer, groups: ParallelGroups, **options: Any
) -> tuple[float, list[tuple[int, torch.Tensor, torch.Tensor]]]:
    """Return the loss over all ranks, as a training's loop reads it, and (pack, rows, tokens) of this rank's packs.

    There are rows on the last pipeline stage only.
    """
    mine = range(len(SIZES))[groups.data[0] :: groups.data[1]]
    optimizer.zero_grad()
    metrics = forward_backward(
        forward_step, mine, wrapped, groups, num_microbatches=len(mine), pack_tokens=PACK_TOKENS, **options
    )
    assert bool(metrics) == groups.is_last_stage, f"{len(metrics)} metrics on stage {groups.pipeline}"
    local = torch.stack([sums for sums, _, _ in metrics]).sum(dim=0) if metrics else None
    total, count = sum_over_tokens(from_last_stage(local, groups), groups).tolist()
    return total / count, [(pack, rows, tokens) for pack, (_, rows, tokens) in zip(mine, metrics, strict=False)]


def whole_gradients(
    wrapped: DistributedDataParallel, optimizer: Optimizer, groups: ParallelGroups
) -> dict[str, torch.Tensor]:
    """Return every gradient of this rank's parameters, scaled back.

    Each data and context rank has finished its share of each bucket, so the shares are gathered first.
    """
    group = groups.data_context_group
    for buffer in wrapped.buffers:
        for bucket in buffer.buckets:
            shares = list(bucket.grad_data.chunk(group.size()))
            dist.all_gather(shares, shares[group.rank()].clone(), group=group)
    return {name: p.main_grad / optimizer.loss_scale for name, p in wrapped.module.named_parameters()}


def master_weights(wrapped: DistributedDataParallel, optimizer: Optimizer) -> dict[str, tuple[torch.Tensor, slice]]:
    """Return the fp32 weights that this rank's share of the optimizer holds: flat, and which part of the parameter."""
    masters = {}
    for name, parameter in wrapped.module.named_parameters():
        weight = parameter.detach().view(-1)
        if weight.dtype == torch.float32:
            masters[name] = (weight, slice(None))
            continue
        for inner in getattr(optimizer.inner, "chained_optimizers", [optimizer.inner]):
            if parameter in inner.model_param_gbuf_map and getattr(parameter, "main_param", None) is not None:
                share = inner._get_model_param_range_map(parameter)["param"]
                masters[name] = (parameter.main_param.detach(), slice(share.start, share.end))
    return masters


def shards(whole: dict[str, torch.Tensor], model: nn.Module, groups: ParallelGroups) -> dict[str, torch.Tensor]:
    """Return what this rank's parameters stand for of the reference's tensors."""
    return {name: shard_of(whole[name], parameter, groups) for name, parameter in model.named_parameters()}


@dataclass(frozen=True)
class Bounds:
    """Largest relative errors against one process: of rows, gradients and weights after the step.

    `updates` bounds new minus old weight, which are two numbers of like size: in fp32 the rounding of a weight of 1 is
    6e-5 of a step of 1e-3.
    """

    rows: float = 1e-5
    gradients: float = 1e-5
    weights: float = 1e-5
    updates: float = 1e-3
    loss: float = 1e-5


def assert_equals_one_process(groups: ParallelGroups, setting: Setting, bounds: Bounds | None = None) -> None:
    """Compare one step on this layout with one process."""
    bounds = bounds or Bounds()
    reference = Reference(groups, setting)
    wrapped, optimizer = wrapped_with_optimizer(groups, setting)
    model = wrapped.module
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loss, packs = forward_and_backward(wrapped, optimizer, groups)
    assert abs(loss / reference.losses[0] - 1) < bounds.loss, (loss, reference.losses)
    for pack, rows, tokens in packs:
        all_rows, all_tokens = reference.rows[pack]
        expected_rows = all_rows[torch.isin(all_tokens, tokens).to(all_rows.device)]
        assert_close(rows, expected_rows, bounds.rows, f"rows of pack {pack}")

    gradients = whole_gradients(wrapped, optimizer, groups)
    measured = [name for name in gradients if not name.endswith(setting.unmeasured)]
    expected = shards(reference.gradients, model, groups)
    _compare({name: gradients[name] for name in measured}, expected, bounds.gradients)
    taken, norm = optimizer.step()
    assert taken, "the step was not taken"
    assert abs(norm / reference.norms[0] - 1) < bounds.gradients, (norm, reference.norms)
    assert norm > CLIP, f"the gradient of norm {norm} isn't clipped, so that clipping isn't compared"
    after = shards({name: p.detach() for name, p in reference.model.named_parameters()}, model, groups)
    held = {name: part for name, part in master_weights(wrapped, optimizer).items() if name in measured}
    new = {name: after[name].reshape(-1)[place] for name, (_, place) in held.items()}
    old = {name: before[name].reshape(-1)[place].float() for name, (_, place) in held.items()}
    _compare({name: master for name, (master, _) in held.items()}, new, bounds.weights)
    changes = {name: master - old[name] for name, (master, _) in held.items()}
    _compare(changes, {name: new[name] - old[name] for name in held}, bounds.updates)
    for name, (master, place) in held.items():
        assert torch.equal(dict(model.named_parameters())[name].detach().view(-1)[place], master.to(setting.dtype)), (
            name
        )


def _compare(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float) -> None:
    assert_all_close(actual, {name: expected[name] for name in actual}, bound)
