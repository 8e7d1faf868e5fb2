"""Layers on pipeline stages, and what the stages tell each other (1F1B: Narayanan et al. 2021, section 2.2).

Each stage holds consecutive blocks; the first also the embedding, the last the head. Between them travels the one
tensor `[S_local, 1, D]`, sent by megatron-core's schedule (`data_parallel.forward_backward`). What every stage holds
whole, such as the time embedding, gets its gradient summed over the stages, counts once in the gradient's norm and is
saved once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer import TransformerConfig
from torch import nn

from megacogvx.errors import ConfigError
from megacogvx.parallel.groups import ParallelGroups


def split_layers(num_layers: int, stages: int, counts: Sequence[int] | None = None) -> list[range]:
    """Return which layers each stage holds, in order.

    Args:
        num_layers: of the whole model.
        stages: pipeline stages.
        counts: layers of each stage; None splits as evenly as possible. What is left over then goes one each to the
            last stages, which keep the activations of the fewest packs.

    Raises:
        ConfigError: a stage would hold no layer, or `counts` doesn't add up.
    """
    if counts is None:
        if stages > num_layers:
            raise ConfigError(
                f"parallel.pipeline_parallel_size={stages} is more than model.num_layers={num_layers}, and a stage "
                f"needs a layer; sizes that work: 1 to {num_layers}"
            )
        counts = [(num_layers + stage) // stages for stage in range(stages)]
    elif len(counts) != stages or sum(counts) != num_layers or min(counts) < 1:
        even = split_layers(num_layers, min(stages, num_layers))
        raise ConfigError(
            f"parallel.pipeline_layers={list(counts)} must name one number for each of the {stages} stages "
            f"(parallel.pipeline_parallel_size), each at least 1, with the sum model.num_layers={num_layers}; "
            f"for example {[len(layers) for layers in even]}"
        )
    ends = [sum(counts[: stage + 1]) for stage in range(stages)]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def hold_on_every_stage(module: nn.Module, groups: ParallelGroups) -> None:
    """Mark the parameters of a module that each stage holds whole and uses for its own layers.

    Their gradients are partial sums: `sum_gradients_over_stages` adds them before the optimizer step. Without stages
    nothing is marked.

    Args:
        module: the same on every stage, under the same names.
        groups: process groups.
    """
    stage, stages = groups.pipeline
    if stages == 1:
        return
    for parameter in module.parameters():
        parameter.pipeline_parallel = True  # type: ignore[attr-defined]
        # Counts in the norm on the first stage alone.
        parameter.shared = stage > 0  # type: ignore[attr-defined]


def is_on_every_stage(tensor: torch.Tensor) -> bool:
    """Return whether `hold_on_every_stage` marked this parameter."""
    return bool(getattr(tensor, "pipeline_parallel", False))


def sum_gradients_over_stages(model: DistributedDataParallel, groups: ParallelGroups) -> None:
    """Add the finished gradients of what every stage holds, in place.

    megatron-core's own sum (`has_cond_embedder`) is wrong beside more than one data or context rank: there a rank has
    the finished gradient of its share of the buffer alone, and the stages, whose buffers hold other layers, cut other
    shares. A bucket of its own for each such parameter would make the shares equal, but buckets with padding between
    them are saved wrongly by the one format of optimizer states that changes layouts.

    Args:
        model: from `data_parallel.wrap`; its gradients are reduced over data and context ranks.
        groups: process groups.
    """
    gradients, finished = [], []
    for buffer in model.buffers:
        for parameter, (start, end, place) in buffer.param_index_map.items():
            if is_on_every_stage(parameter):
                bucket, ranks = buffer.buckets[place], groups.data_context_group
                share = bucket.grad_data.numel() // ranks.size()
                first = bucket.offset + share * ranks.rank()
                own = slice(min(max(first, start), end) - start, min(max(first + share, start), end) - start)
                gradients.append(parameter.main_grad.view(-1))
                finished.append(torch.zeros_like(gradients[-1]))
                finished[-1][own] = gradients[-1][own]
    total = torch.cat(finished)
    for group in (groups.data_context_group, groups.pipeline_group):
        dist.all_reduce(total, group=group)
    for gradient, part in zip(gradients, total.split([len(gradient) for gradient in gradients]), strict=True):
        gradient.copy_(part)


def communicator(core: TransformerConfig, groups: ParallelGroups) -> P2PCommunicator | None:
    """Return what megatron-core's schedule sends and receives with; None without stages."""
    return P2PCommunicator(pp_group=groups.pipeline_group, config=core) if groups.pipeline[1] > 1 else None


def from_last_stage(values: torch.Tensor | None, groups: ParallelGroups) -> torch.Tensor:
    """Return the last stage's `values` on every stage; losses and metrics exist only there.

    Args:
        values: fp32 `[n]`; None on the other stages, which need not know n.
        groups: process groups.

    Backward: none.
    """
    if groups.pipeline[1] == 1:
        assert values is not None, "no values on the only stage"
        return values
    assert (values is not None) == groups.is_last_stage, f"values {values} on stage {groups.pipeline}"
    last = dist.get_global_rank(groups.pipeline_group, groups.pipeline[1] - 1)
    size = torch.tensor([0 if values is None else values.numel()], device=groups.device)
    dist.broadcast(size, last, group=groups.pipeline_group)
    if values is None:
        result = torch.empty(int(size), device=groups.device)
    else:
        assert values.dtype == torch.float32 and values.ndim == 1, f"{values.dtype} {tuple(values.shape)}"
        result = values.detach().clone().to(groups.device)
    dist.broadcast(result, last, group=groups.pipeline_group)
    return result
