"""What one layout saves, any other loads: weights, moments, master weights and steps."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from megacogvx.testing.mini_model import MiniModel, fill, forward_step, packs
from megacogvx.testing.spawn import on_ranks
from megacogvx.testing.tolerance import assert_close

TP2 = {"tensor_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
LAYOUTS = {"tp2": TP2, "cp2": CP2, "dp2": {}}
SETTINGS = {"lr": 1e-2, "total_steps": 10, "weight_decay": 0.1}


def switch(layout):
    """Take the process groups down and make those of `layout`; the processes stay."""
    from megacogvx.parallel import groups as parallel_groups
    from megacogvx.parallel.config import ParallelConfig

    parallel_groups.shutdown(stay_connected=True)
    return parallel_groups.initialize(ParallelConfig(timeout_minutes=2.0, **layout))


def make(groups, seed=0, dtype=torch.float32, overlap=False, **changes):
    from megacogvx.parallel.data_parallel import wrap
    from megacogvx.parallel.optimizer import build_optimizer

    model = fill(MiniModel(groups, dtype), seed)
    wrapped = wrap(model, model.core, groups, overlap=overlap)
    return wrapped, build_optimizer(wrapped, groups, **{**SETTINGS, **changes})


def take_step(wrapped, optimizer, step, groups):
    from megacogvx.parallel.data_parallel import forward_backward

    mine = packs(step, device=groups.device)[groups.data[0] :: groups.data[1]]
    optimizer.zero_grad()
    optimizer.schedule(step)
    forward_backward(forward_step, mine, wrapped, groups, num_microbatches=len(mine))
    return optimizer.step()[1]


def full_weights(wrapped, groups):
    """Every parameter as one process would hold it."""
    from megacogvx.parallel.tensor_parallel import is_cut

    whole = {}
    for name, parameter in wrapped.module.named_parameters():
        value = parameter.detach().clone()
        if is_cut(parameter):
            parts = [torch.empty_like(value) for _ in range(groups.tensor[1])]
            torch.distributed.all_gather(parts, value, group=groups.tensor_group)
            value = torch.cat(parts, parameter.partition_dim)
        whole[name] = value
    return whole


def assert_same(actual, expected, bound):
    for name, value in expected.items():
        assert_close(actual[name], value, bound, name)


def folder_of(folder):
    from megacogvx.checkpoint.directory import CheckpointDirectory

    return CheckpointDirectory(folder)


def run_from_to(groups, folder, dtype, bound):
    """Train two steps and save here; load and take the third step on every layout."""
    from megacogvx.checkpoint.distributed import load, save

    wrapped, optimizer = make(groups, dtype=dtype)
    for step in range(2):
        take_step(wrapped, optimizer, step, groups)
    extra = {"step": 2, "loader": {"place": [1, 2]}}
    path = save(folder_of(folder), 2, wrapped, optimizer, extra, groups, texts={"config.yaml": "model: {}\n"})
    assert (path / "config.yaml").read_text() == "model: {}\n"
    saved = full_weights(wrapped, groups)
    norm = take_step(wrapped, optimizer, 2, groups)
    after = full_weights(wrapped, groups)
    for layout in LAYOUTS.values():
        other = switch(layout)
        wrapped, optimizer = make(other, seed=1, dtype=dtype)
        assert load(path, wrapped, optimizer, other) == extra
        assert_same(full_weights(wrapped, other), saved, 0.0)
        assert abs(take_step(wrapped, optimizer, 2, other) / norm - 1) < bound
        assert_same(full_weights(wrapped, other), after, bound)


@on_ranks(2, TP2)
def test_any_layout_loads_what_this_one_saved(groups, folder):
    run_from_to(groups, folder, torch.float32, 1e-5)


@on_ranks(2, CP2, {}, slow=True)
def test_any_layout_loads_what_another_one_saved(groups, folder):
    run_from_to(groups, folder, torch.float32, 1e-5)


@contextmanager
def many_buckets():
    """Make gradient buckets of a few parameters each, as large models have them, with padding in between."""
    from megacogvx.parallel import data_parallel

    whole = data_parallel.DistributedDataParallelConfig
    data_parallel.DistributedDataParallelConfig = partial(whole, bucket_size=200)
    try:
        yield
    finally:
        data_parallel.DistributedDataParallelConfig = whole


@on_ranks(2, {})
def test_states_in_several_buckets_come_back_and_reshard(groups, folder):
    """Reduced during the backward pass, in buckets with padding in between: saved, loaded on both layouts."""
    from megacogvx.checkpoint.distributed import load, save

    with many_buckets():
        wrapped, optimizer = make(groups, overlap=True)
        (buffer,) = wrapped.buffers
        assert len(buffer.buckets) > 2 and (groups.data[1] == 1 or buffer.numel > buffer.numel_unpadded), "no padding"
        for step in range(2):
            take_step(wrapped, optimizer, step, groups)
        path = save(folder_of(folder), 2, wrapped, optimizer, {}, groups)
        norm = take_step(wrapped, optimizer, 2, groups)
        after = full_weights(wrapped, groups)
        same, again = make(groups, seed=1, overlap=True)
        load(path, same, again, groups)
        assert take_step(same, again, 2, groups) == norm
        assert_same(full_weights(same, groups), after, 0.0)
    for layout in ({}, TP2):  # in one bucket
        other = switch(layout)
        moved, optimizer = make(other, seed=1)
        load(path, moved, optimizer, other)
        assert abs(take_step(moved, optimizer, 2, other) / norm - 1) < 1e-5
        assert_same(full_weights(moved, other), after, 1e-5)


@on_ranks(2, {})
def test_each_save_of_a_run_loads_though_the_later_ones_are_not_planned_again(groups, folder):
    """From the third on the ranks exchange nothing to plan; another model in between is planned anew."""
    from megacogvx.checkpoint.distributed import load, start_save
    from megacogvx.checkpoint.writing import SavePlans

    wrapped, optimizer = make(groups)
    directory, plans, weights, taken = folder_of(folder), SavePlans(), {}, [(optimizer,)] * 4 + [(None,), (optimizer,)]
    for step, (kept,) in enumerate(taken):
        take_step(wrapped, optimizer, step, groups)
        pending = start_save(directory, step, wrapped, kept, {"at": step}, groups, background=True, plans=plans)
        weights[step] = full_weights(wrapped, groups)
        take_step(wrapped, optimizer, step, groups)  # while it is written
        pending.finish()
    for step, (kept,) in enumerate(taken):
        other, fresh = make(groups, seed=1)
        assert load(directory.path(step), other, fresh if kept else None, groups) == {"at": step}
        assert_same(full_weights(other, groups), weights[step], 0.0)


def continue_alone(path):
    """Load `path` on one process, take the third step, save again and leave the weights as a file."""
    from megacogvx.checkpoint.distributed import load, save
    from megacogvx.parallel import groups as parallel_groups
    from megacogvx.parallel.config import ParallelConfig

    groups = parallel_groups.initialize(ParallelConfig(device="cpu"))
    wrapped, optimizer = make(groups, seed=1)
    extra = load(path, wrapped, optimizer, groups)
    take_step(wrapped, optimizer, 2, groups)
    save(folder_of(path.parent), 3, wrapped, optimizer, extra, groups)
    torch.save({k: v.cpu() for k, v in full_weights(wrapped, groups).items()}, path.parent / "alone.pt")
    parallel_groups.shutdown()


@on_ranks(2, TP2, slow=True)
def test_one_process_goes_on_and_hands_back(groups, folder):
    from megacogvx.checkpoint.distributed import load, save
    from megacogvx.parallel.groups import barrier

    wrapped, optimizer = make(groups)
    for step in range(2):
        take_step(wrapped, optimizer, step, groups)
    path = save(folder_of(folder), 2, wrapped, optimizer, {"step": 2}, groups)
    if groups.is_first:
        places = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
        alone = {name: value for name, value in os.environ.items() if name not in places}
        subprocess.run([sys.executable, __file__, str(path)], check=True, env=alone)
    barrier(groups)
    take_step(wrapped, optimizer, 2, groups)
    after = full_weights(wrapped, groups)
    assert_same(torch.load(folder / "alone.pt"), after, 1e-5)
    take_step(wrapped, optimizer, 3, groups)
    last = full_weights(wrapped, groups)

    other = switch({})
    wrapped, optimizer = make(other, seed=1)
    assert load(folder_of(folder).latest(), wrapped, optimizer, other) == {"step": 2}
    assert_same(full_weights(wrapped, other), after, 1e-5)
    take_step(wrapped, optimizer, 3, other)
    assert_same(full_weights(wrapped, other), last, 1e-5)


@on_ranks(2, TP2, slow=True)
def test_bf16_master_weights_come_back(groups, folder):
    run_from_to(groups, folder, torch.bfloat16, 1e-2)


@on_ranks(2, TP2)
def test_fp16_comes_back_with_its_loss_scale(groups, folder):
    from megacogvx.checkpoint.distributed import load, save

    wrapped, optimizer = make(groups, dtype=torch.float16, initial_loss_scale=2.0**30)
    while not math.isfinite(take_step(wrapped, optimizer, 0, groups)):
        pass
    scale = optimizer.loss_scale
    path = save(folder_of(folder), 1, wrapped, optimizer, {}, groups)
    other, fresh = make(groups, seed=1, dtype=torch.float16)
    assert fresh.loss_scale != scale
    load(path, other, fresh, groups)
    assert fresh.loss_scale == scale
    assert take_step(other, fresh, 1, groups) == take_step(wrapped, optimizer, 1, groups)
    assert_same(full_weights(other, groups), full_weights(wrapped, groups), 0.0)


@on_ranks(2, TP2)
def test_weights_alone_and_settings_of_the_new_run(groups, folder):
    from megacogvx.checkpoint.distributed import load, save

    wrapped, optimizer = make(groups, dtype=torch.bfloat16)
    take_step(wrapped, optimizer, 0, groups)
    path = save(folder_of(folder), 1, wrapped, optimizer, {}, groups)
    saved = full_weights(wrapped, groups)

    model = fill(MiniModel(groups, torch.bfloat16), seed=1)
    load(path, model, None, groups)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), wrapped.module.parameters(), strict=True))

    other, fresh = make(groups, seed=2, dtype=torch.bfloat16)
    load(path, other, None, groups)
    fresh.reload_weights()
    fresh.schedule(0)
    fresh.zero_grad()
    fresh.step()  # no gradient: weight decay alone may move the master weights, from where the model is
    for name, value in full_weights(other, groups).items():
        decay = 1.0 if value.ndim == 1 else 1 - fresh.lr * SETTINGS["weight_decay"]
        assert_close(value, saved[name] * decay, 1e-2, name)

    changed, slower = make(groups, lr=1e-4, dtype=torch.bfloat16)
    load(path, changed, slower, groups)
    assert slower.schedule(0) <= 1e-4
    assert {group["max_lr"] for group in slower.inner.param_groups} == {1e-4}


def _let_one_rank_fail(groups, path, wrapped, optimizer):
    """Let each file that a rank reads by itself fail on rank 1, after the checksums; no rank may wait for another."""
    from megacogvx.checkpoint import reading, run_state
    from megacogvx.checkpoint.distributed import load
    from megacogvx.errors import CheckpointError

    def fail(*_, **__):
        raise OSError(5, "Input/output error")

    for module, name in ((torch, "load"), (run_state, "read_metadata"), (reading.KnownReader, "read_data")):
        with pytest.MonkeyPatch.context() as patch:
            if groups.rank == 1:
                patch.setattr(module, name, fail)
            with pytest.raises(CheckpointError, match="Input/output error"):
                load(path, wrapped, optimizer, groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "read_metadata", fail)  # what each load has read once it doesn't read again
        load(path, wrapped, optimizer, groups)


@on_ranks(2, {})
def test_every_rank_names_what_is_wrong(groups, folder):
    from megacogvx.checkpoint.distributed import load, save
    from megacogvx.checkpoint.manifest import MANIFEST
    from megacogvx.errors import CheckpointError
    from megacogvx.parallel.groups import barrier

    wrapped, optimizer = make(groups)
    path = save(folder_of(folder), 1, wrapped, optimizer, {}, groups)
    largest = max(path.glob("*.distcp"), key=lambda file: file.stat().st_size).name

    def broken(name, change):
        copy = folder / name
        if groups.is_first:
            shutil.copytree(path, copy)
            change(copy)
        barrier(groups)
        with pytest.raises(CheckpointError) as caught:
            load(copy, wrapped, optimizer, groups)
        barrier(groups)
        return str(caught.value)

    def flip(copy, name=largest):
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content)

    def hide(copy):
        manifest = json.loads((copy / MANIFEST).read_text())
        manifest["format"] = "another"
        (copy / MANIFEST).write_text(json.dumps(manifest))

    before = full_weights(wrapped, groups)
    assert largest in broken("flipped", flip)
    assert ".metadata" in broken("metadata", lambda copy: flip(copy, ".metadata"))
    assert largest in broken("missing", lambda copy: (copy / largest).unlink())
    assert MANIFEST in broken("unfinished", lambda copy: (copy / MANIFEST).unlink())
    assert "another" in broken("foreign", hide)
    with pytest.raises(CheckpointError, match="does not exist"):
        load(folder / "nowhere", wrapped, optimizer, groups)
    _let_one_rank_fail(groups, path, wrapped, optimizer)
    assert_same(full_weights(wrapped, groups), before, 0.0)


@on_ranks(2, {})
def test_another_model_is_refused_by_name(groups, folder):
    from megacogvx.checkpoint.distributed import load, save
    from megacogvx.errors import CheckpointError

    model = torch.nn.ModuleDict({"conv": torch.nn.Conv3d(2, 3, 3), "norm": torch.nn.GroupNorm(1, 3)})
    path = save(folder_of(folder), 1, model, None, {}, groups)
    same = torch.nn.ModuleDict({"conv": torch.nn.Conv3d(2, 3, 3), "norm": torch.nn.GroupNorm(1, 3)})
    load(path, same, None, groups)
    assert torch.equal(same["conv"].weight, model["conv"].weight) or groups.rank == 1  # rank 0's are kept
    wider = torch.nn.ModuleDict({"conv": torch.nn.Conv3d(2, 4, 3), "norm": torch.nn.GroupNorm(1, 4)})
    with pytest.raises(CheckpointError, match=r"conv.*\(3,\).*\(4,\)"):
        load(path, wider, None, groups)
    with pytest.raises(CheckpointError, match="norm"):
        load(path, torch.nn.ModuleDict({"conv": same["conv"]}), None, groups)


@on_ranks(2, {})
def test_a_write_that_fails_on_one_rank_fails_on_all_and_leaves_the_old(groups, folder):
    from megacogvx.checkpoint import manifest
    from megacogvx.checkpoint.distributed import load, save
    from megacogvx.errors import CheckpointError
    from megacogvx.parallel.groups import barrier

    directory = folder_of(folder)
    model = fill(MiniModel(groups))
    save(directory, 1, model, None, {"good": True}, groups)
    seal = manifest.seal
    if groups.rank == 1:

        def seal_fails(path, name):
            raise OSError(28, "No space left on device")

        manifest.seal = seal_fails
    try:
        with pytest.raises(CheckpointError, match="No space left"):
            save(directory, 2, model, None, {}, groups)
    finally:
        manifest.seal = seal
    barrier(groups)
    assert directory.steps() == [1]
    assert load(directory.latest(), model, None, groups) == {"good": True}
    save(directory, 2, model, None, {}, groups)
    save(directory, 2, model, None, {"again": math.pi}, groups)
    assert directory.steps() == [1, 2]
    assert load(directory.latest(), model, None, groups) == {"again": math.pi}


if __name__ == "__main__":
    continue_alone(Path(sys.argv[1]))
