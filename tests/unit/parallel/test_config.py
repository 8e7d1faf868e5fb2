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
