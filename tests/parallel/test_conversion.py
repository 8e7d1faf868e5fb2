"""Checkpoints of other formats and layouts: converted ones load on any, saved on any they convert, bit for bit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megacogvx.checkpoint.directory import CheckpointDirectory
from megacogvx.checkpoint.distributed import load, save
from megacogvx.checkpoint.find import find_checkpoint
from megacogvx.conversion.convert import convert, open_parts
from megacogvx.conversion.part import ReadOptions
from megacogvx.conversion.settings import dump_settings
from megacogvx.errors import CheckpointError, DataError
from megacogvx.inference.load import load_transformer
from megacogvx.models.transformer.model import CogVideoXTransformer, transformer_core
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.groups import barrier
from megacogvx.parallel.tensor_parallel import shard_of
from megacogvx.testing.drawn_checkpoint import tiny_parts
from megacogvx.testing.spawn import on_ranks
from megacogvx.training.ema import WeightAverage


@on_ranks(2, {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2})
def test_a_converted_checkpoint_loads_on_any_layout_and_comes_back(groups, folder):
    """SAT's file, ours, this layout, a checkpoint saved from it with averaged weights, diffusers' folder, by names."""
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
    check_shards(model, part, groups)
    assert found.resolved["conventions"]["repeated_frames"] == "predicted"

    average = WeightAverage(model, 0.9, groups)
    for tensor in average.averages.values():
        tensor.add_(1)
    extra = {"config": dump_settings(part.settings)}
    save(CheckpointDirectory(folder / "run" / "checkpoints"), 7, model, None, extra, groups, beside={"ema": average})
    if not groups.is_first:
        return
    for weights, more in (("live", 0), ("ema", 1)):
        saved = open_parts([folder / "run"], ReadOptions(weights=weights))
        back = open_parts([convert(saved, "diffusers", folder / weights, check=False)], ReadOptions())["transformer"]
        assert back.tensors.infos == part.tensors.infos
        for name in part.tensors.infos:
            assert torch.equal(back.tensors.read(name), part.tensors.read(name) + more), (weights, name)


@on_ranks(2, {"tensor_parallel_size": 2})
def test_foreign_weights_load_for_generation_as_they_lie(groups, folder):
    """A diffusers folder in shards, and SAT's release, live and averaged; an error of one rank is every rank's."""
    part = tiny_parts("1.5-5b-i2v")["transformer"]
    if groups.is_first:
        convert({"transformer": part}, "diffusers", folder / "diffusers", max_shard_bytes=50_000, check=False)
        convert({"transformer": part}, "sat", folder / "sat", check=False)
        state = folder / "sat" / "transformer" / "1"
        state.rename(state.with_name("2"))
        (state.parent / "latest").write_text("2")
        (state.parent / "2-ema").symlink_to("2")
    barrier(groups)
    for path, weights in (("diffusers", "live"), ("diffusers/transformer", "live"), ("sat", "live"), ("sat", "ema")):
        model = load_transformer(folder / path, groups, torch.float32, weights)
        check_shards(model, part, groups)
        assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    barrier(groups)
    shard = folder / "diffusers" / "transformer"
    if groups.is_first:
        spoil_the_last_heads(shard)
    barrier(groups)
    with pytest.raises(DataError, match=r"infinite: blocks\.0\.attention\.qkv\.weight \(1 of .*convert or"):
        load_transformer(folder / "diffusers", groups, torch.float32)
    barrier(groups)
    if groups.is_first:
        (file,) = shard.glob("*-00002-of-*.safetensors")
        file.write_bytes(file.read_bytes()[:-4])
    barrier(groups)
    with pytest.raises(CheckpointError, match="is cut short"):
        load_transformer(folder / "diffusers", groups, torch.float32)


def spoil_the_last_heads(folder):
    """Put a NaN into weights of a diffusers folder that the last tensor rank holds."""
    name = "transformer_blocks.0.attn1.to_q.weight"
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    file = folder / index["weight_map"][name]
    tensors = load_file(file)
    tensors[name][-1, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})


def check_shards(model, part, groups):
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    assert held
    for name, tensor in held.items():
        assert torch.equal(tensor, shard_of(part.tensors.read(name), tensor, groups)), name
