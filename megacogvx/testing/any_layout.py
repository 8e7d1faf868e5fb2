"""The small transformer and the step of `one_process.py` on any layout, held to what one process computes.

Compared are the predicted rows, the losses, every gradient and its norm, and the weights after the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megacogvx.parallel.data_parallel import (
    DistributedDataParallel,
    forward_backward,
    sum_over_tokens,
    wrap,
)
from megacogvx.parallel.groups import ParallelGroups
from megacogvx.parallel.optimizer import Optimizer, build_optimizer
from megacogvx.parallel.pipeline_parallel import from_last_stage
from megacogvx.parallel.tensor_parallel import shard_of
from megacogvx.testing import one_process
from megacogvx.testing.one_process import (
    BETAS,
    CLIP,
    DECAY,
    EPS,
    LR,
    Reference,
    Setting,
    forward_step,
    make,
)
from megacogvx.testing.tolerance import assert_all_close, assert_close

LOSS_SCALE = 8.0  # of fp16: no gradient of these packs overflows


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
    mine = range(len(one_process.SIZES))[groups.data[0] :: groups.data[1]]
    optimizer.zero_grad()
    metrics = forward_backward(
        forward_step, mine, wrapped, groups, num_microbatches=len(mine), pack_tokens=one_process.PACK_TOKENS, **options
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
