"""Which part of which global tensor each rank holds.

It is what megatron-core's `dist_checkpointing` needs to save on one layout and load on another.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn

from megacogvx.parallel.groups import ParallelGroups
from megacogvx.parallel.pipeline_parallel import is_on_every_stage
from megacogvx.parallel.tensor_parallel import is_cut


def sharded_state_dict(module: nn.Module, groups: ParallelGroups, prefix: str = "") -> dict[str, Any]:
    """Return megatron-core's sharded tensors of every parameter and persistent buffer below `module`.

    Linear layers that are cut over the tensor ranks know along which axis; everything else is the same on every rank
    that has it and is written once. Pipeline stages hold tensors of other names, but for a few that all of them hold.

    Args:
        module: the model itself, not its data-parallel wrapper (whose names begin with `module.`).
        groups: process groups.
        prefix: put before each name.

    Returns:
        `{prefix + name: ShardedTensor}`; the tensors are the module's own, so loading into them loads the module.
    """
    # keep_vars: the distributed optimizer finds its parameters in here by identity.
    state = {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if tensor is not None}
    axes = {name: tensor.partition_dim for name, tensor in state.items() if is_cut(tensor)}
    sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
        state, prefix, axes, tp_group=groups.tensor_group, dp_cp_group=groups.data_context_group
    )
    for name, tensor in state.items():
        if is_on_every_stage(tensor):
            part = sharded[prefix + name]
            part.replica_id = (groups.pipeline[0], *part.replica_id[1:])
    return sharded
