from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys

import pytest
import torch

from megacogvx.errors import AgreedError, ConfigError, LaunchError
from megacogvx.parallel import groups as parallel_groups
from megacogvx.parallel.config import ParallelConfig


@pytest.fixture(autouse=True)
def unlaunched(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


def test_tensor_ranks_on_gpus_keep_the_order_of_exchange_and_product(monkeypatch):
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    for size, device, before, after in ((2, "cuda", None, "1"), (2, "auto", "8", "8"), (1, "cuda", None, None),
                                        (2, "cpu", None, None)):  # fmt: skip
        monkeypatch.setenv(name, "")  # it is put back at the end
        monkeypatch.delenv(name) if before is None else monkeypatch.setenv(name, before)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(LaunchError):  # one process is too few, or has no GPU
            parallel_groups.initialize(ParallelConfig(device=device, tensor_parallel_size=size))
        assert os.environ.get(name) == after


def test_one_process_needs_no_launcher_and_can_start_again():
    for _ in range(2):
        groups = parallel_groups.initialize(ParallelConfig(device="cpu"))
        assert groups.tensor == groups.context == groups.data == groups.pipeline == (0, 1)
        assert groups.coordinates == "dp0 pp0 cp0 tp0"
        assert groups.is_first
        assert parallel_groups.gather_json({"a": [1.5, "ä"]}, groups) == [{"a": [1.5, "ä"]}]
        parallel_groups.barrier(groups)
        with pytest.raises(AssertionError, match="shutdown"):
            parallel_groups.initialize(ParallelConfig(device="cpu"))
        parallel_groups.shutdown()
    parallel_groups.shutdown()
    with pytest.raises(LaunchError, match="1 started"):
        parallel_groups.initialize(ParallelConfig(tensor_parallel_size=2))
    assert not torch.distributed.is_initialized()


def as_two_on_nccl(monkeypatch):
    """Let the end of a program see two ranks on NCCL; return how their groups will have been taken down."""
    from torch.distributed import distributed_c10d

    ways: list[str] = []
    destroy = torch.distributed.destroy_process_group
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "nccl")
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed_c10d, "_abort_process_group", lambda: (ways.append("aborted"), destroy()))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: (ways.append("destroyed"), destroy()))
    return ways


@pytest.mark.parametrize(
    ("error", "way"),
    [(None, "destroyed"), (AgreedError("all of them"), "destroyed"), (RuntimeError("this one"), "aborted")],
    ids=["done", "agreed", "alone"],
)
def test_a_rank_that_fails_alone_waits_for_nobody(monkeypatch, caplog, error, way):
    """Destroying NCCL's groups waits for exchanges in which the other ranks wait for this one."""
    logging.getLogger("megacogvx").addHandler(caplog.handler)
    with contextlib.suppress(AgreedError, RuntimeError), parallel_groups.groups_of_a_program():
        parallel_groups.initialize(ParallelConfig(device="cpu"))
        ended = as_two_on_nccl(monkeypatch)
        if error is not None:
            raise error
    logging.getLogger("megacogvx").removeHandler(caplog.handler)
    assert ended == [way]
    assert ("this rank fails: RuntimeError: this one" in caplog.text) is (way == "aborted")


ONE_FAILS = """
import sys, time, torch
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.groups import any_rank, groups_of_a_program, initialize
with groups_of_a_program():
    groups = initialize(ParallelConfig(device=sys.argv[1], timeout_minutes=5))
    any_rank(False, groups)
    if groups.rank == 0:
        time.sleep(2)  # the other waits by now
        raise RuntimeError("out of memory")
    any_rank(False, groups)
"""


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_rank_that_fails_on_its_gpu_ends_the_job_long_before_the_timeout(tmp_path):
    _end_of_two("cuda", tmp_path)


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_job_long_before_the_timeout(tmp_path):
    _end_of_two("cpu", tmp_path)


def _end_of_two(device, folder):
    (folder / "job.py").write_text(ONE_FAILS)
    words = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", folder / "job.py", device)
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, timeout=150)
    assert done.returncode == 1
    assert "[dp0 pp0 cp0 tp0] ERROR this rank fails: RuntimeError: out of memory" in done.stderr
    assert "Traceback" in done.stderr


def test_sizes_that_do_not_divide_the_model_are_named():
    from megacogvx.parallel.megatron import core_config, plain_core_config
    from megacogvx.parallel.tensor_parallel import column_linear, row_linear

    config = ParallelConfig(device="cpu", recompute="full")
    groups = parallel_groups.initialize(config)
    try:
        core = plain_core_config(config, groups, torch.bfloat16)
        assert core.bf16
        assert core.calculate_per_token_loss
        assert core.recompute == "full"
        two = ParallelConfig(context_parallel_size=2)
        sizes = {"hidden_size": 6, "num_layers": 1, "num_attention_heads": 3, "ffn_hidden_size": 8, "norm_eps": 1e-5}
        with pytest.raises(ConfigError, match=r"num_attention_heads=3 .* products that work: 1, 3"):
            core_config(parallel=two, groups=groups, dtype=torch.float32, **sizes)
        cut = parallel_groups.ParallelGroups(**{**vars(groups), "tensor": (0, 4)})
        for make in (column_linear, row_linear):
            with pytest.raises(ConfigError, match=r"features=6 cannot be split .* 1, 2, 3, 6"):
                make(6, 6, core, cut)
    finally:
        parallel_groups.shutdown()
