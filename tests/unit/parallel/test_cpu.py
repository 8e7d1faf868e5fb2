from __future__ import annotations

import importlib

import pytest
import torch

from megacogvx.parallel import cpu, fused_adam


@pytest.fixture(autouse=True)
def enabled():
    cpu.enable_cpu(torch.device("cpu"))


@pytest.mark.parametrize(("module", "name"), cpu.PATCHED_SYMBOLS)
def test_every_patched_symbol_is_still_there(module, name):
    assert hasattr(importlib.import_module(module), name), (
        f"{module}.{name} is gone: cpu.py or fused_adam.py must follow"
    )


def test_core_sees_the_cpu_and_nobody_else_does():
    from megatron.core import utils

    assert utils.torch is not torch
    assert utils.torch.cuda.current_device() == torch.device("cpu")
    assert utils.torch.zeros(2, device="cuda").device.type == "cpu"
    assert utils.torch.ones is not torch.ones
    assert utils.torch.nn is torch.nn
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError)):
            torch.zeros(2, device="cuda")
        with pytest.raises((RuntimeError, AssertionError)):
            torch.zeros(2).cuda()


def test_types_are_renamed_for_the_optimizer_alone():
    half = torch.zeros(1, dtype=torch.bfloat16)
    assert half.type() == "torch.BFloat16Tensor"
    asked = {"tensor": half, "__name__": "megatron.core.optimizer.optimizer"}
    assert eval("tensor.type()", asked) == "torch.cuda.BFloat16Tensor"
    assert eval("tensor.type('torch.FloatTensor')", asked).dtype == torch.float32
    other = {"tensor": half, "__name__": "megatron.core.tensor_parallel.layers"}
    assert eval("tensor.type()", other) == "torch.BFloat16Tensor"
    assert eval("tensor.cuda()", other) is half


def test_modules_imported_later_are_patched_too():
    module = importlib.import_module("megatron.core.dist_checkpointing.strategies.filesystem_async")
    assert module.torch is not torch


def test_fused_adam_is_adamw():
    torch.manual_seed(0)
    start = [torch.randn(3, 4), torch.randn(5)]
    mine, other = ([tensor.clone().requires_grad_() for tensor in start] for _ in range(2))
    settings = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.3}
    optimizers = fused_adam.FusedAdam(mine, **settings), torch.optim.AdamW(other, **settings)
    for _ in range(3):
        for optimizer, parameters in zip(optimizers, (mine, other), strict=True):
            optimizer.zero_grad()
            sum((parameter**3).sum() for parameter in parameters).backward()
            optimizer.step()
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(mine, other, strict=True))
    assert optimizers[0].param_groups[0]["step"] == 3
    assert set(optimizers[0].state[mine[0]]) == {"exp_avg", "exp_avg_sq"}
