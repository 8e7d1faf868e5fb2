"""Kernels and layers that a config names and that aren't there are refused before a process group exists."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megacogvx.errors import ConfigError
from megacogvx.parallel import groups, software
from megacogvx.parallel.config import ParallelConfig

TE = {"transformer_impl": "transformer_engine"}


def on_a_gpu(monkeypatch, capability, missing=()):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(software.importlib.util, "find_spec", lambda name: None if name in missing else name)
    monkeypatch.setattr(software, "missing", lambda name: "not installed" if name in missing else "")


def test_what_needs_nothing_passes():
    software.check_software(ParallelConfig())
    software.check_software(ParallelConfig(attention_backend="reference", device="cpu"))


def test_a_kernel_that_is_not_there_names_those_that_are(monkeypatch):
    on_a_gpu(monkeypatch, (9, 0), missing=("flash2", "flash3", "transformer_engine"))
    message = "parallel.attention_backend=flash3 can't be used: not installed; what can: auto, reference, cudnn, varlen"
    with pytest.raises(ConfigError) as error:
        software.check_software(ParallelConfig(attention_backend="flash3"))
    assert str(error.value) == message
    software.check_software(ParallelConfig(attention_backend="cudnn"))
    with pytest.raises(
        ConfigError, match=r"attention_backend=cudnn can't be used: parallel\.device=cpu; .*auto, reference$"
    ):
        software.check_software(ParallelConfig(attention_backend="cudnn", device="cpu"))


def test_transformer_engine_that_is_not_there(monkeypatch):
    with pytest.raises(
        ConfigError, match=r"transformer_impl=transformer_engine .*module transformer_engine .*can: local"
    ):
        software.check_software(ParallelConfig(**TE))
    on_a_gpu(monkeypatch, (9, 0), missing=("transformer_engine_torch",))
    with pytest.raises(ConfigError, match="module transformer_engine_torch can't be found"):
        software.check_software(ParallelConfig(**TE))


def test_a_recipe_that_the_gpu_lacks_names_those_that_it_has(monkeypatch):
    on_a_gpu(monkeypatch, (9, 0))
    software.check_software(ParallelConfig(**TE, fp8_recipe="blockwise"))
    with pytest.raises(
        ConfigError, match=r"mxfp8 needs .* 10\.0, not 9\.0; what can be used: none, tensorwise, blockwise$"
    ):
        software.check_software(ParallelConfig(**TE, fp8_recipe="mxfp8"))


def test_it_is_said_before_a_process_group_exists():
    with pytest.raises(ConfigError, match="transformer_engine"):
        groups.initialize(ParallelConfig(device="cpu", **TE))
    assert not dist.is_initialized()
