"""Pipeline stages: which parameters they hold, initial weights, checkpoints; the table of layouts has the rest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megacogvx.testing.spawn import on_ranks
from megacogvx.testing.tolerance import assert_close

PP2 = {"pipeline_parallel_size": 2}
TP2 = {"tensor_parallel_size": 2}


@on_ranks(2, PP2)
def test_initial_weights_do_not_depend_on_the_split(groups):
    from megacogvx.models.transformer import initialize_weights
    from megacogvx.testing.one_process import Setting, alone, make

    reference, model = make(alone(groups), Setting()), make(groups, Setting())
    initialize_weights(reference, seed=3)
    initialize_weights(model, seed=3)
    whole = dict(reference.named_parameters())
    names = set(dict(model.named_parameters()))
    assert names < set(whole)
    assert ("head.proj.weight" in names) == groups.is_last_stage
    assert ("embedding.text_proj.weight" in names) == groups.is_first_stage
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, whole[name]), name


def load_and_step(path, groups):
    """Load on this layout; return the weights loaded, and loss and norm of the next step."""
    from megacogvx.checkpoint.distributed import load
    from megacogvx.testing.any_layout import forward_and_backward, wrapped_with_optimizer
    from megacogvx.testing.one_process import Setting

    wrapped, optimizer = wrapped_with_optimizer(groups, Setting())
    with torch.no_grad():
        for parameter in wrapped.module.parameters():
            parameter.zero_()
    assert load(path, wrapped, optimizer, groups) == {"steps": 2}
    loaded = {name: parameter.detach().clone() for name, parameter in wrapped.module.named_parameters()}
    loss, _ = forward_and_backward(wrapped, optimizer, groups)
    return wrapped, loaded, loss, optimizer.step()[1]


def switch(layout):
    """Take the process groups down and make those of `layout`; the processes stay."""
    from megacogvx.parallel import groups as parallel_groups
    from megacogvx.parallel.config import ParallelConfig

    parallel_groups.shutdown(stay_connected=True)
    return parallel_groups.initialize(ParallelConfig(timeout_minutes=2.0, **layout))


@on_ranks(2, PP2)
def test_checkpoints_change_the_number_of_stages(groups, folder):
    from megacogvx.checkpoint.directory import CheckpointDirectory
    from megacogvx.checkpoint.distributed import save
    from megacogvx.testing.any_layout import forward_and_backward, shards, wrapped_with_optimizer
    from megacogvx.testing.one_process import Reference, Setting

    reference = Reference(groups, Setting(), steps=3)
    wrapped, optimizer = wrapped_with_optimizer(groups, Setting())
    without, _ = forward_and_backward(wrapped, optimizer, groups, forward_only=True)
    assert abs(without / reference.losses[0] - 1) < 1e-5
    for _ in range(2):
        forward_and_backward(wrapped, optimizer, groups)
        optimizer.step()
    path = save(CheckpointDirectory(folder), 2, wrapped, optimizer, {"steps": 2}, groups)
    saved = {name: parameter.detach().clone() for name, parameter in wrapped.module.named_parameters()}

    def check(other, wrapped, loaded, loss, norm):
        expected = shards(saved, SimpleNamespace(named_parameters=lambda: own(wrapped)), other)
        assert all(torch.equal(loaded[name], value) for name, value in expected.items())
        assert abs(loss / reference.losses[2] - 1) < 1e-5 and abs(norm / reference.norms[2] - 1) < 1e-5
        weights = shards(dict(reference.model.named_parameters()), wrapped.module, other)
        for name, parameter in wrapped.module.named_parameters():
            assert_close(parameter.detach(), weights[name].detach(), 1e-5, name)

    def own(wrapped):
        """Parameters that this rank's stage had saved."""
        return [(name, parameter) for name, parameter in wrapped.module.named_parameters() if name in saved]

    if groups.is_first:
        places = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
        environment = {name: value for name, value in os.environ.items() if name not in places}
        subprocess.run([sys.executable, __file__, str(path)], check=True, env=environment)
    dist.barrier()
    single = torch.load(path.parent / "alone.pt")
    assert all(torch.equal(single["loaded"][name], value) for name, value in saved.items())
    assert abs(single["loss"] / reference.losses[2] - 1) < 1e-5
    for layout in (PP2, TP2, {}):
        other = switch(layout)
        check(other, *load_and_step(path, other))
    # and from one stage back to two
    last = save(
        CheckpointDirectory(folder / "whole"), 3, *wrapped_with_optimizer(other, Setting()), {"steps": 2}, other
    )
    load_and_step(last, switch(PP2))


def alone_from_checkpoint(path):
    from megacogvx.parallel import groups as parallel_groups
    from megacogvx.parallel.config import ParallelConfig

    groups = parallel_groups.initialize(ParallelConfig(device="cpu"))
    _, loaded, loss, _ = load_and_step(path, groups)
    torch.save({"loaded": loaded, "loss": loss}, path.parent / "alone.pt")
    parallel_groups.shutdown()


@on_ranks(2, PP2)
def test_a_stage_says_when_it_received_nothing(groups):
    from megacogvx.testing.one_process import Setting, forward_step, make

    model = make(groups, Setting())
    if not groups.is_first_stage:
        with pytest.raises(AssertionError, match="without the schedule"):
            forward_step(iter([0]), model)


if __name__ == "__main__":
    alone_from_checkpoint(Path(sys.argv[1]))
