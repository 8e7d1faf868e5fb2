"""What a checkpoint is asked for before any tensor is read; tests/parallel loads real ones."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megacogvx.checkpoint import run_state, together
from megacogvx.errors import CheckpointError


def test_a_checkpoint_that_another_rank_cannot_read_is_an_error_here_too(monkeypatch, tmp_path):
    """Else this rank would take its error for the names of its tensors, and wait for them."""
    monkeypatch.setattr(run_state, "read_metadata", lambda path: SimpleNamespace(state_dict_metadata={}))
    monkeypatch.setattr(together, "gather_json", lambda mine, groups: [mine, "OSError: stale file handle"])
    monkeypatch.setattr(run_state, "gather_json", lambda mine, groups: [mine, mine])
    with pytest.raises(CheckpointError, match="stale file handle"):
        run_state.check_tensors(tmp_path, {}, None)
