"""Weights that aren't numbers are named before they turn a whole video into noise."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megacogvx.errors import DataError
from megacogvx.models import weights
from megacogvx.models.weights import check_finite


def test_finite_weights_pass():
    check_finite(nn.Linear(3, 2), "a checkpoint")


def test_weights_that_are_not_numbers_are_named_and_counted():
    model = nn.Sequential(*(nn.Linear(2, 3) for _ in range(5)))
    with torch.no_grad():
        model[1].weight[0, 0] = model[1].weight[2, 1] = torch.nan
        for place in (2, 3, 4):
            model[place].bias[1] = torch.inf
    with pytest.raises(DataError) as error:
        check_finite(model, "run/step-7")
    assert str(error.value) == (
        "weights of run/step-7 are NaN or infinite: 1.weight (2 of 6 values), 2.bias (1 of 3 values), "
        "3.bias (1 of 3 values) and 1 more; take an earlier checkpoint, or convert or download this one again"
    )


def test_a_table_kept_as_a_buffer_is_a_weight_too():
    model = nn.Linear(2, 2)
    model.register_buffer("positions", torch.tensor([1.0, torch.nan, torch.inf]))
    with pytest.raises(DataError, match=r"infinite: positions \(2 of 3 values\);"):
        check_finite(model, "a release")


@pytest.mark.parametrize("bad", [True, False])
def test_what_one_rank_finds_is_the_error_of_all(bad, monkeypatch):
    """Of two ranks the other one's part is bad, and this one's may be."""
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.bias[1] = torch.nan if bad else 0.0
    monkeypatch.setattr(weights, "gather_json", lambda mine, groups: [mine, "the other's"])
    with pytest.raises(DataError, match=r"bias \(1 of 2 values\)" if bad else "the other's"):
        weights.check_finite_on_every_rank(model, "a release", None)
    monkeypatch.setattr(weights, "gather_json", lambda mine, groups: [mine, None])
    if not bad:
        weights.check_finite_on_every_rank(model, "a release", None)


def test_fp16_is_told_to_be_narrow():
    model = nn.Linear(2, 2).half()
    model.weight.data[0, 0] = 1e5
    with pytest.raises(DataError, match="fp16 holds nothing above 65504: try bf16"):
        check_finite(model, "x")
