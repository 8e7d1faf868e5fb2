"""What the ranks of a replica hold, to each of them; sampling needs rows and latents together, training never does."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megacogvx.pack_layout import PackLayout
from megacogvx.parallel.groups import ParallelGroups


def gather_rows(rows_VP: torch.Tensor, layout: PackLayout, groups: ParallelGroups) -> torch.Tensor:
    """Gather the video rows of a pack over tensor and context ranks.

    Args:
        rows_VP: `[V_local, P]`, the rows of this rank's video tokens, as a transformer returns them.
        layout: the pack, the same on every rank.
        groups: process groups.

    Returns:
        `[V, P]`, all video rows of the pack in its order, equal on every rank of the replica.

    Backward: none; the result has no gradient.
    """
    local = layout.local(groups.tensor, groups.context, rows_VP.device)
    assert len(rows_VP) == len(local.video_index), f"{len(rows_VP)} rows for {len(local.video_index)} video tokens"
    # Ranks hold equal numbers of tokens, not of video tokens: gather by tokens, then leave the text out.
    tokens_SP = rows_VP.new_zeros(len(local.tokens), rows_VP.shape[1])
    tokens_SP[local.video_index] = rows_VP.detach()
    for group in (groups.tensor_group, groups.context_group):  # the inner cut first
        tokens_SP = _gather(tokens_SP, group)
    return tokens_SP[layout.local(device=rows_VP.device).video_index]


def share(tensor: torch.Tensor, source: int, groups: ParallelGroups) -> torch.Tensor:
    """Give every rank of a replica what one of them holds.

    Args:
        tensor: on the source what is shared; elsewhere any tensor of its shape and dtype, which is overwritten.
        source: the rank among those of the replica, context ranks outer, tensor ranks inner.
        groups: process groups.

    Returns:
        `tensor`, on `groups.device`.

    Backward: none; the result has no gradient.
    """
    context, inner = divmod(source, groups.tensor[1])
    tensor = tensor.detach().to(groups.device).contiguous()
    for group, place in ((groups.context_group, context), (groups.tensor_group, inner)):
        if group.size() > 1:
            dist.broadcast(tensor, group=group, group_src=place)
    return tensor


def _gather(tokens_SP: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    if group.size() == 1:
        return tokens_SP
    parts = [torch.empty_like(tokens_SP) for _ in range(group.size())]
    dist.all_gather(parts, tokens_SP, group=group)
    return torch.cat(parts)
