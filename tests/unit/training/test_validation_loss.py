"""The loss of held-out packs: at each timestep over all of them, and with the averaged weights too."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import torch

from megacogvx.training import validation_loss
from megacogvx.training.validation_loss import ValidationLoss


def test_each_pack_is_measured_at_each_timestep_and_the_watch_hears_of_it(monkeypatch):
    """A validation that takes longer than the watch's limit is no hang."""
    told, weights = [], [1.0]

    def forward_backward(step, microbatches, *_, num_microbatches, forward_only, **__):
        seen = list(microbatches)
        assert forward_only and num_microbatches == len(seen)
        return [{"sums": torch.tensor([weights[0] * pack.loss * sum(at), len(at)])} for pack, at in seen]

    @contextmanager
    def in_use():
        weights[0] = 0.5
        yield
        weights[0] = 1.0

    monkeypatch.setattr(validation_loss, "forward_backward", forward_backward)
    monkeypatch.setattr(validation_loss, "from_last_stage", lambda values, groups: values)
    monkeypatch.setattr(validation_loss, "sum_over_tokens", lambda values, groups: values)
    packs = [SimpleNamespace(loss=loss, layout=SimpleNamespace(num_samples=3)) for loss in (1.0, 3.0)]
    measured = ValidationLoss(
        None, packs, (100, 300), None, None, 8, lambda sums: {"loss": sums[0] / sums[1]}, SimpleNamespace(in_use=in_use)
    ).measure(7, lambda: told.append("on"))
    assert measured == {
        "validation_loss": 400.0, "validation_loss_by_timestep": [200.0, 600.0], "validation_loss_ema": 200.0,
    }  # fmt: skip
    assert len(told) == 2 * 2 * 2, "packs, timesteps, sets of weights"
