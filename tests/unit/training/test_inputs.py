"""What is wrong with a step's texts is said before the ranks compute together."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megacogvx.errors import AgreedError
from megacogvx.training import agreement
from megacogvx.training.inputs import pack_inputs
from megacogvx.training.text_condition import TextRows


def test_token_ids_that_are_none_of_the_encoders_end_all_ranks_before_the_step(monkeypatch):
    monkeypatch.setattr(agreement, "any_rank", lambda condition, groups: condition)
    monkeypatch.setattr(agreement, "gather_json", lambda value, groups: [[None, False], value])
    groups = SimpleNamespace(**dict.fromkeys(("tensor", "context", "pipeline", "data"), (0, 1)))
    config = SimpleNamespace(data=SimpleNamespace(max_bad_in_a_row=1))
    loader = iter([[SimpleNamespace(text=[torch.tensor([1, 2]), torch.tensor([9])])]])
    texts = TextRows(4, ids=True, encoder=SimpleNamespace(vocabulary=9))
    with pytest.raises(AgreedError, match=r"reading the data of a step failed: rank 1: DataError: .*token ids 9 to 9"):
        next(pack_inputs(loader, config, groups, {}, texts))
