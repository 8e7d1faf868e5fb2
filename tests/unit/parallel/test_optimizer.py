"""The learning rate of each step: every step has one, and the schedule's ends lie outside of the run."""

from __future__ import annotations

import math

import pytest
import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megacogvx.parallel.optimizer import Optimizer


def rates(steps: int, warmup: int, min_lr: float = 0.0, decay: str = "cosine", asked: int | None = None) -> list[float]:
    """Return the rates of the first `asked` steps (default: all) under a peak of 1."""
    inner = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    scheduler = OptimizerParamScheduler(
        inner, init_lr=0.0, max_lr=1.0, min_lr=min_lr, lr_warmup_steps=warmup, lr_decay_steps=steps,
        lr_decay_style=decay, start_wd=0.0, end_wd=0.0, wd_incr_steps=0, wd_incr_style="constant",
    )  # fmt: skip
    optimizer = Optimizer.__new__(Optimizer)
    optimizer.inner, optimizer.scheduler = inner, scheduler
    return [optimizer.schedule(step) for step in range(asked or steps)]


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (2, 1), (10, 0), (10, 4), (10, 9)])
def test_no_step_trains_with_a_rate_of_0(steps, warmup):
    found = rates(steps, warmup)
    assert min(found) > 0 and max(found) == 1
    assert found[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    cosine = [0.5 * (1 + math.cos(math.pi * done / (steps - warmup))) for done in range(steps - warmup)]
    assert found[warmup:] == pytest.approx(cosine)


def test_the_end_of_the_decay_holds_after_it():
    assert rates(10, 2, min_lr=0.1, asked=13)[10:] == pytest.approx([0.1] * 3)
    assert rates(3, 1, decay="constant", asked=5) == [1] * 5
