from __future__ import annotations

import pytest

from megacogvx.config import build_config
from megacogvx.errors import ConfigError
from megacogvx.parallel.config import ParallelConfig


def test_defaults_are_one_process():
    assert ParallelConfig().replica_size == 1
    assert ParallelConfig(tensor_parallel_size=2, context_parallel_size=3).replica_size == 6


@pytest.mark.parametrize(
    "values",
    [
        {"tensor_parallel_size": 0},
        {"device": "tpu"},
        {"recompute": "some"},
        {"recompute": "block:0"},
        {"timeout_minutes": 0},
    ],
)
def test_values_out_of_range(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        build_config(ParallelConfig, values)


@pytest.mark.parametrize(("context", "ring"), [(24, 4), (4, 4), (6, 1)])
def test_rings_take_their_share_of_the_context_ranks(context, ring):
    config = ParallelConfig(context_parallel_size=context, ring_size=ring, tensor_parallel_size=2)
    assert config.ulysses_size * ring == context and config.replica_size == 2 * context


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"context_parallel_size": 6, "ring_size": 4},
            r"ring_size=4 doesn't divide context_parallel_size=6.*1, 2, 3, 6",
        ),
        ({"ring_size": 2}, r"ring_size=2 doesn't divide context_parallel_size=1"),
        (
            {"context_parallel_size": 2, "ring_size": 2, "attention_backend": "flash2"},
            "attention_backend=flash2 .*ring_size=2.*use attention_backend=auto, or ring_size=1",
        ),
        ({"fp8_recipe": "mxfp8"}, "fp8_recipe=mxfp8 needs transformer_impl=transformer_engine"),
        ({"fp8_recipe": "delayed"}, "fp8_recipe"),
        ({"data_parallel": "megatron_fsdp"}, "megatron_fsdp is not offered.*CUDA.*data_parallel=distributed_optimizer"),
        ({"attention_backend": "flash"}, "attention_backend"),
    ],
)
def test_settings_that_contradict_each_other(values, message):
    with pytest.raises(ConfigError, match=message):
        build_config(ParallelConfig, values)


def test_heads_that_do_not_divide_name_what_would_work():
    assert ParallelConfig(context_parallel_size=24, ring_size=4, tensor_parallel_size=8).head_problem(48) is None
    problem = ParallelConfig(context_parallel_size=32).head_problem(48)
    assert problem == (
        "model.num_attention_heads=48 cannot be split over parallel.tensor_parallel_size=1 x "
        "parallel.context_parallel_size=32 = 32; products that work: 1, 2, 3, 4, 6, 8, 12, 16, 24, 48; "
        "or parallel.ring_size=2 for these context ranks"
    )
    problem = ParallelConfig(tensor_parallel_size=4, context_parallel_size=4, ring_size=2).head_problem(30)
    assert "parallel.context_parallel_size=4 / parallel.ring_size=2 = 8" in problem and "or parallel" not in problem
