from math import prod

import pytest
import torch

from megacogvx.models.transformer import CogVideoXConfig, CogVideoXTransformer, transformer_core
from megacogvx.models.transformer.config import PRESETS
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.groups import initialize, shutdown
from megacogvx.training.estimate.parameters import count_parameters, stage_weights


@pytest.fixture(scope="module")
def groups():
    yield initialize(ParallelConfig(device="cpu"))
    shutdown()


@pytest.mark.parametrize("preset", PRESETS)
def test_the_list_is_the_model(preset, groups):
    config = CogVideoXConfig(preset=preset)
    with torch.device("meta"):
        model = CogVideoXTransformer(config, transformer_core(config, ParallelConfig(), groups, torch.bfloat16), groups)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {weight.name: weight.shape for weight in stage_weights(config, ParallelConfig())} == shapes


@pytest.mark.parametrize(("preset", "count"), [("cogvideox_2b", 1_693_783_872), ("cogvideox_5b", 5_570_283_072)])
def test_the_published_sizes(preset, count):
    assert sum(count_parameters(CogVideoXConfig(preset=preset)).values()) == count


def test_stages_hold_every_weight_once_and_the_condition_each():
    config = CogVideoXConfig(preset="tiny")
    parallel = ParallelConfig(pipeline_parallel_size=2, pipeline_layers=(1, 3))
    stages = [stage_weights(config, parallel, stage) for stage in range(2)]
    names = [weight.name for stage in stages for weight in stage if weight.part != "time"]
    assert sorted(names) == sorted(w.name for w in stage_weights(config, ParallelConfig()) if w.part != "time")
    assert all(any(weight.part == "time" for weight in stage) for stage in stages)
    assert not any(weight.name.startswith("blocks.1.") for weight in stages[0])


def test_tensor_ranks_share_what_is_cut():
    weights = {weight.name: weight for weight in stage_weights(CogVideoXConfig(preset="tiny"), ParallelConfig())}
    assert weights["blocks.0.attention.qkv.weight"].local_shape(2) == (192, 128)
    assert weights["blocks.0.mlp.fc2.weight"].local_shape(2) == (128, 256)
    assert weights["blocks.0.mlp.fc2.bias"].local_size(2) == prod(weights["blocks.0.mlp.fc2.bias"].shape)
