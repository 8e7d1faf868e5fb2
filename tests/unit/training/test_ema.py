"""Averaged weights: the formula, the swap into the model and back, and what a checkpoint keeps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.groups import initialize, shutdown
from megacogvx.testing.tolerance import assert_close
from megacogvx.training.ema import WeightAverage, deal


class Net(nn.Module):
    """One weight, one buffer of numbers and one counter."""

    def __init__(self, value: float, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), value, dtype=dtype))
        self.register_buffer("table", torch.tensor([value]))
        self.register_buffer("count", torch.tensor(int(value)))


@pytest.fixture(scope="module")
def groups():
    yield initialize(ParallelConfig(device="cpu"))
    shutdown()


def set_to(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(value)


def test_average_follows_the_formula_and_forgets_its_start(groups):
    model = Net(0.0)
    average, expected = WeightAverage(model, 0.5, groups), 0.0
    for step in range(8):
        set_to(model, step + 1.0)
        average.update(step)
        keep = min(0.5, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * (step + 1)
    assert_close(average.averages["weight"], torch.full((3,), expected), 1e-6)
    assert_close(average.averages["table"], torch.tensor([expected]), 1e-6)
    assert average.averages["count"] == 8, "what is no floating number can't be averaged"


def test_small_changes_of_bf16_weights_are_not_lost(groups):
    model = Net(1.0, torch.bfloat16)
    average = WeightAverage(model, 0.9999, groups)
    set_to(model, 2.0)
    average.update(1_000_000)
    assert_close(average.averages["weight"], torch.full((3,), 1.0001), 1e-6)


def test_averages_are_in_use_only_for_a_while(groups):
    model = Net(1.0)
    average = WeightAverage(model, 0.5, groups)
    set_to(model, 3.0)
    with average.in_use():
        assert model.weight.tolist() == [1.0] * 3
    assert model.weight.tolist() == [3.0] * 3 and model.count == 3


def test_loading_what_was_saved_gives_the_averages_back(groups):
    saved, other = WeightAverage(Net(1.0), 0.5, groups), WeightAverage(Net(2.0), 0.5, groups)
    parts = saved.sharded_state_dict()
    assert set(parts) == {"ema.weight", "ema.table", "ema.count"}
    assert all(part.dtype == part.data.dtype for part in parts.values())
    other.load_state_dict({name: part.data for name, part in parts.items()})
    assert torch.equal(other.averages["weight"], saved.averages["weight"])
    other.restart()
    assert other.averages["weight"].tolist() == [2.0] * 3


def test_tensors_are_dealt_once_and_evenly():
    """Each has one owner, whatever order the names come in; the fullest rank holds no more than the mean + one."""
    sizes = {f"weight{n}": (n * 7919) % 100 + 1 for n in range(50)}
    owners = deal(sizes, 4)
    assert owners == deal(dict(reversed(sizes.items())), 4) and set(owners) == set(sizes)
    held = [sum(size for name, size in sizes.items() if owners[name] == rank) for rank in range(4)]
    assert sum(held) == sum(sizes.values()) and max(held) - min(held) <= max(sizes.values())
    assert set(deal({"only": 5}, 3).values()) == {0}


def test_what_is_no_tensor_is_left_alone(groups):
    """Transformer Engine keeps FP8's scales in a state's `_extra_state`, which may be None."""

    class WithState(Net):
        def get_extra_state(self):
            return None

        def set_extra_state(self, state):
            raise AssertionError(state)

    average = WeightAverage(WithState(1.0), 0.5, groups)
    average.update(0)
    with average.in_use():
        pass
    assert set(average.averages) == {"weight", "table", "count"}
