"""A converted checkpoint loads on any layout: every rank gets its part of the tensors that were converted."""

import torch

from megacogvx.checkpoint.distributed import load
from megacogvx.checkpoint.find import find_checkpoint
from megacogvx.conversion.convert import convert, open_parts
from megacogvx.conversion.part import ReadOptions
from megacogvx.models.transformer.model import CogVideoXTransformer, transformer_core
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.groups import barrier
from megacogvx.parallel.tensor_parallel import shard_of
from megacogvx.testing.drawn_checkpoint import tiny_parts
from megacogvx.testing.spawn import on_ranks


@on_ranks(2, {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2})
def test_a_converted_checkpoint_loads_on_any_layout(groups, folder):
    part = tiny_parts("5b-i2v")["transformer"]
    if groups.is_first:
        convert({"transformer": part}, "sat", folder / "sat", check=False)
        convert(open_parts([folder / "sat"], ReadOptions()), "megacogvx", folder / "ours", check=False)
    barrier(groups)
    config = part.settings.model
    parallel = ParallelConfig(tensor_parallel_size=groups.tensor[1], pipeline_parallel_size=groups.pipeline[1])
    model = CogVideoXTransformer(config, transformer_core(config, parallel, groups, torch.float32), groups)
    found = find_checkpoint(folder / "ours" / "transformer")
    load(found.path, model, None, groups)
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    assert held
    for name, tensor in held.items():
        assert torch.equal(tensor, shard_of(part.tensors.read(name), tensor, groups)), name
    assert found.resolved["conventions"]["repeated_frames"] == "predicted"
