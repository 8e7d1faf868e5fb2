from __future__ import annotations

import pytest
import torch

from megacogvx.errors import LaunchError
from megacogvx.parallel import groups as parallel_groups
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.launch import LaunchEnvironment, array_task, check_world_size, choose_device, launch_environment

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "11",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
}


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    for name in (*NAMES, *SLURM):
        monkeypatch.delenv(name, raising=False)


def set_all(monkeypatch, values):
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_nobody_launched_it():
    assert launch_environment() == LaunchEnvironment(0, 1, 0, 1)


def test_torchrun(monkeypatch):
    set_all(monkeypatch, {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", **SLURM})
    assert launch_environment() == LaunchEnvironment(9, 16, 1, 8)
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(LaunchError, match="LOCAL_RANK"):
        launch_environment()


def test_slurm(monkeypatch):
    set_all(monkeypatch, SLURM)
    assert launch_environment() == LaunchEnvironment(5, 11, 1, 4)
    monkeypatch.setenv("SLURM_NODEID", "2")
    assert launch_environment().local_world_size == 3
    with pytest.raises(LaunchError, match="MASTER_ADDR"):
        parallel_groups.initialize(ParallelConfig(device="cpu"))


def array(task, **changes):
    values = {"ID": task, "MIN": 1, "MAX": 9, "COUNT": 5, "STEP": 2, **changes}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


def test_tasks_of_a_slurm_array(monkeypatch):
    for name in array(1):
        monkeypatch.delenv(name, raising=False)
    assert array_task() == (0, 1)
    for place, task in enumerate(range(1, 10, 2)):
        set_all(monkeypatch, array(task))
        assert array_task() == (place, 5)
    set_all(monkeypatch, array(1, COUNT=3))
    with pytest.raises(LaunchError, match="have gaps; submit it as --array=0-2"):
        array_task()


def test_a_slurm_batch_script_is_one_process(monkeypatch):
    set_all(monkeypatch, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"})
    assert launch_environment().world_size == 1


@pytest.mark.parametrize(("world_size", "message"), [(3, "start at least 4"), (6, "start 4 or 8")])
def test_sizes_that_do_not_fit_name_ones_that_do(world_size, message):
    config = ParallelConfig(tensor_parallel_size=2, context_parallel_size=2)
    check_world_size(config, 8)
    with pytest.raises(LaunchError, match=message) as caught:
        check_world_size(config, world_size)
    assert "parallel.tensor_parallel_size=2" in str(caught.value)


@pytest.mark.parametrize(
    ("device", "gpus", "local", "expected"),
    [
        ("auto", 4, 4, "cuda:1"),
        ("auto", 3, 4, "cpu"),
        ("cpu", 8, 4, "cpu"),
        ("cuda", 8, 4, "cuda:1"),
        ("auto", 0, 1, "cpu"),
    ],
)
def test_device(monkeypatch, device, gpus, local, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    chosen = choose_device(ParallelConfig(device=device), LaunchEnvironment(1, local, 1, local))
    assert chosen == torch.device(expected)


def test_a_cpu_beside_too_few_gpus_is_said(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    choose_device(ParallelConfig(), LaunchEnvironment(0, 8, 0, 8))
    assert "sees 1 GPU(s) for the 8 processes" in caplog.text
    choose_device(ParallelConfig(device="cpu"), LaunchEnvironment(0, 8, 0, 8))
    assert caplog.text.count("CPU is used") == 1


def test_cuda_without_enough_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LaunchError, match="has 0 for 2"):
        choose_device(ParallelConfig(device="cuda"), LaunchEnvironment(0, 2, 0, 2))
