"""Image to video on every axis, restarted on another: losses and averaged weights are those of one layout."""

from __future__ import annotations

import pytest

from megacogvx.testing.spawn import on_ranks

BOUND = 2e-4  # relative, between layouts after a few optimizer steps
NUMBERS = ("loss", "validation_loss", "validation_loss_ema")
LAYOUTS = (
    {"tensor_parallel_size": 2}, {"context_parallel_size": 2}, {"pipeline_parallel_size": 2}, {},
)  # fmt: skip


@pytest.mark.slow
@on_ranks(2)
def test_no_layout_and_no_restart_on_another_changes_the_run(groups, folder):
    from megacogvx.testing.tiny_run import train_on

    expected, groups = train_on(groups, folder, "whole", 4, **LAYOUTS[0])
    for place, layout in enumerate(LAYOUTS):
        _, groups = train_on(groups, folder, f"run{place}", 2, **layout)
        rows, groups = train_on(groups, folder, f"run{place}", 4, **LAYOUTS[(place + 1) % len(LAYOUTS)])
        for ours, theirs in zip(rows, expected, strict=True):
            for name in NUMBERS:
                wanted = theirs.get(name) and pytest.approx(theirs[name], rel=BOUND)
                assert ours.get(name) == wanted, f"{name} of {layout} at step {ours['step']}"
