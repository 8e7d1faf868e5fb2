"""The state of a run as JSON."""

import pytest

from megacogvx.errors import CheckpointError
from megacogvx.training.state import TrainState


def test_round_trip():
    state = TrainState(3, 10, 2000, {"epoch": 1})
    assert TrainState.from_json(state.to_json()) == state


def test_state_of_another_version():
    with pytest.raises(CheckpointError, match="unexpected keyword argument 'epochs'"):
        TrainState.from_json({"step": 1, "epochs": 2})
