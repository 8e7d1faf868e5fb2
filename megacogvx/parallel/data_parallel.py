"""Packs over the data ranks: gradient reduction, the schedule of one step, and sums of metrics.

Gradients are summed over data and context ranks, kept and reduced in fp32, and divided once by the count of the whole
step (`calculate_per_token_loss`). The optimizer's states lie on the data ranks, a share on each (ZeRO stage 1,
Rajbhandari et al. 2020); `optimizer.py` makes it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from torch import nn

from megacogvx.parallel.groups import ParallelGroups
from megacogvx.parallel.pipeline_parallel import communicator, sum_gradients_over_stages

LossFunction = Callable[[Any], tuple[torch.Tensor, torch.Tensor, Any]]
ForwardStep = Callable[[Iterator[Any], nn.Module], tuple[Any, LossFunction]]


def wrap(
    model: nn.Module, core: TransformerConfig, groups: ParallelGroups, *, overlap: bool = False
) -> DistributedDataParallel:
    """Move `model` to this rank's device and give it gradient buffers that are reduced over data and context ranks.

    Args:
        model: made of this room's linears and plain modules; its weights are set already, equal on all data ranks.
        core: megatron-core's settings of the model.
        groups: process groups.
        overlap: reduce each bucket of gradients while the backward pass goes on.

    Returns:
        megatron-core's wrapper; call it as the model. `unwrap` gives the model back.
    """
    # A copy: the schedule reads hooks of this very model from it, and two models may share the settings.
    core = copy.copy(core)
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=overlap,
        check_for_nan_in_grad=False,  # Optimizer.step looks at the norm and skips the step
    )
    wrapped = DistributedDataParallel(core, settings, model.to(groups.device), pg_collection=groups.collection)
    core.finalize_model_grads_func = partial(_finish_gradients, groups)
    core.no_sync_func = wrapped.no_sync
    # The schedule asks every model for these two; they matter with pipeline stages only.
    wrapped.model_type = ModelType.encoder_or_decoder
    if not hasattr(model, "set_input_tensor"):
        assert groups.pipeline[1] == 1, f"{type(model).__name__} can't be cut into pipeline stages"
        wrapped.set_input_tensor = _ignore
    # It also numbers the layers of whatever is called `decoder`, taking it for a language model's.
    wrapped.decoder = SimpleNamespace(layers=())
    return wrapped


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside its data-parallel wrapper, or `model` if there is none."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def forward_backward(
    forward_step: ForwardStep,
    microbatches: Iterable[Any],
    model: DistributedDataParallel,
    groups: ParallelGroups,
    *,
    num_microbatches: int,
    pack_tokens: int = 1,
    forward_only: bool = False,
) -> list[Any]:
    """Run the packs of one step forward and backward and finish the gradients.

    Afterwards each gradient is that of (sum of all losses / sum of all counts), over packs, data and context ranks,
    as one process with all packs would have it; `Optimizer.step` can follow.

    Args:
        forward_step: `forward_step(iterator, model) -> (output, loss_function)`. It takes one pack from the iterator
            and calls the model. `loss_function(output) -> (loss, count, metrics)`: the sum of the losses of this
            rank's rows (scalar with a history), the int32 count that divides it, equal on all tensor ranks, and what
            is returned here. Metrics must be detached clones: the schedule changes the loss in place.
        microbatches: this rank's packs.
        model: from `wrap`.
        groups: process groups.
        num_microbatches: how many packs to take; equal on all ranks, at least 1.
        pack_tokens: tokens of each pack, padding included, over all ranks; read with pipeline stages only, which have
            to know the shape of what they receive.
        forward_only: compute the losses alone, without gradients.

    Returns:
        What the loss function gave as metrics, one entry per pack, of this rank alone; empty on all pipeline
        stages but the last.
    """
    assert num_microbatches >= 1, f"{num_microbatches} microbatches"
    run = get_forward_backward_func(groups.pipeline[1])
    metrics: list[Any] = run(
        forward_step_func=_without_gradient(forward_step) if forward_only else forward_step,
        data_iterator=iter(microbatches),
        model=model,
        num_microbatches=num_microbatches,
        seq_length=pack_tokens,  # these two give the shape between stages
        micro_batch_size=1,
        forward_only=forward_only,
        p2p_communicator=communicator(model.config, groups),
        pg_collection=groups.collection,
    )
    return metrics


def sum_over_tokens(values: torch.Tensor, groups: ParallelGroups) -> torch.Tensor:
    """Return the sum of `values` over all ranks that hold different tokens: data, context and tensor ranks.

    For sums over local rows, such as the loss. Under sequence parallelism the tensor ranks hold different rows. Ranks
    of one pipeline stage are added: with stages, `from_last_stage` comes first.

    Args:
        values: any shape, one dtype, the same shape on all ranks.

    Backward: none.
    """
    return _sum(values, groups.collection.tp_dp_cp, groups)


def sum_over_data_and_context(values: torch.Tensor, groups: ParallelGroups) -> torch.Tensor:
    """Return the sum of `values` over data and context ranks.

    For numbers that all tensor ranks hold equal, such as the count that divides the loss.

    Args:
        values: any shape, one dtype, the same shape on all ranks.

    Backward: none.
    """
    return _sum(values, groups.data_context_group, groups)


def broadcast_from(tensor: torch.Tensor, owner: int, groups: ParallelGroups) -> None:
    """Overwrite `tensor` on all data and context ranks with that of the rank numbered `owner` among them.

    Backward: none.
    """
    if groups.data_context_group.size() > 1:
        dist.broadcast(tensor.detach(), group=groups.data_context_group, group_src=owner)


def max_over_ranks(values: torch.Tensor, groups: ParallelGroups) -> torch.Tensor:
    """Return the largest of `values` over all ranks, element by element (the slowest rank's seconds, say)."""
    result = values.detach().clone().to(groups.device)
    dist.all_reduce(result, op=dist.ReduceOp.MAX)
    return result


def _finish_gradients(
    groups: ParallelGroups, model: list[DistributedDataParallel], *counts: Any, **options: Any
) -> None:
    finalize_model_grads(model, *counts, **options)
    if groups.pipeline[1] > 1:
        sum_gradients_over_stages(model[0], groups)


def _sum(values: torch.Tensor, group: dist.ProcessGroup, groups: ParallelGroups) -> torch.Tensor:
    result = values.detach().clone().to(groups.device)
    dist.all_reduce(result, group=group)
    return result


def _without_gradient(forward_step: ForwardStep) -> ForwardStep:
    """Wrap `forward_step` so that neither the model nor the loss records a history."""

    def step(iterator: Iterator[Any], model: nn.Module) -> tuple[Any, LossFunction]:
        with torch.no_grad():
            output, loss_function = forward_step(iterator, model)
        return output, torch.no_grad()(loss_function)

    return step


def _ignore(tensor: Any) -> None:
    return None
