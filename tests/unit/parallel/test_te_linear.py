"""Transformer Engine's linear layers, played by fakes: which are made, with which arguments, and in which FP8."""

from __future__ import annotations

import contextlib
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from megacogvx.models.transformer import CogVideoXConfig, CogVideoXTransformer, transformer_core
from megacogvx.parallel import tensor_parallel
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.groups import initialize, shutdown

CONFIG = CogVideoXConfig(preset="tiny", num_layers=2, num_attention_heads=2, attention_head_dim=16)
TE = ParallelConfig(transformer_impl="transformer_engine", fp8_recipe="blockwise")


class FakeLinear(nn.Module):
    """What both wrappers share: parameters, a state of their own, (result, None)."""

    def __init__(self, input_size, output_size, *, config, init_method, bias, skip_bias_add, is_expert, tp_group):
        super().__init__()
        assert bias and not skip_bias_add and not is_expert and not config.use_cpu_initialization
        self.config, self.tp_group, self.depth = config, tp_group, []
        self.weight = nn.Parameter(torch.zeros(output_size, input_size, dtype=config.params_dtype))
        self.bias = nn.Parameter(torch.zeros(output_size, dtype=config.params_dtype))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias), None

    def get_extra_state(self):
        return torch.zeros(1)


class FakeColumn(FakeLinear):
    """As `TEColumnParallelLinear` of megatron-core 0.16.1 declares its arguments."""

    def __init__(self, input_size, output_size, *, gather_output, skip_weight_param_allocation=False,
                 tp_comm_buffer_name=None, stride=1, **common):  # fmt: skip
        assert gather_output is False
        super().__init__(input_size, output_size, **common)


class FakeRow(FakeLinear):
    """As `TERowParallelLinear`."""

    def __init__(self, input_size, output_size, *, input_is_parallel, tp_comm_buffer_name=None, **common):
        assert input_is_parallel is True
        super().__init__(input_size, output_size, **common)


@pytest.fixture(scope="module")
def groups():
    yield initialize(ParallelConfig(device="cpu"))
    shutdown()


@pytest.fixture
def contexts(monkeypatch):
    """The fakes, and the FP8 settings of every context that is entered."""
    import megatron.core.extensions
    from megatron.core import fp8_utils

    fake = ModuleType("megatron.core.extensions.transformer_engine")
    fake.TEColumnParallelLinear, fake.TERowParallelLinear = FakeColumn, FakeRow
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setattr(megatron.core.extensions, "transformer_engine", fake, raising=False)
    entered = []

    @contextlib.contextmanager
    def context(config):
        entered.append((config.fp8, config.fp8_recipe))
        yield

    monkeypatch.setattr(fp8_utils, "get_fp8_context", context)
    return entered


def make(groups, parallel):
    return CogVideoXTransformer(CONFIG, transformer_core(CONFIG, parallel, groups, torch.float32), groups)


def test_token_projections_are_transformer_engines_and_nothing_else(groups, contexts):
    model, local = make(groups, TE), make(groups, ParallelConfig())
    theirs = {name for name, module in model.named_modules() if isinstance(module, FakeLinear)}
    assert theirs == {
        f"blocks.{layer}.{name}"
        for layer in range(2)
        for name in ("attention.qkv", "attention.out", "mlp.fc1", "mlp.fc2")
    }
    rows = {name for name, module in model.named_modules() if isinstance(module, FakeRow)}
    assert {name.rpartition(".")[2] for name in rows} == {"out", "fc2"}
    assert all(model.get_submodule(name).tp_group is groups.tensor_group for name in theirs)
    assert not any(isinstance(module, FakeLinear) for module in local.modules())
    # the same checkpoint fits both, cut along the same axes
    kept, others = ({n for n, t in m.state_dict().items() if t is not None} for m in (model, local))
    assert kept == others
    for name, parameter in model.named_parameters():
        other = local.get_parameter(name)
        for mark in ("tensor_model_parallel", "partition_dim", "sequence_parallel"):
            assert getattr(parameter, mark, None) == getattr(other, mark, None), (name, mark)


@pytest.mark.parametrize(
    ("recipe", "format"), [("tensorwise", "hybrid"), ("blockwise", "e4m3"), ("mxfp8", "e4m3"), ("none", None)]
)
def test_each_call_enters_the_recipe_that_the_config_names(groups, contexts, recipe, format):
    model = make(groups, TE.model_copy(update={"fp8_recipe": recipe}))
    out = model.blocks["0"].mlp(torch.ones(4, 1, CONFIG.hidden_size))
    assert out.shape == (4, 1, CONFIG.hidden_size)
    assert [entered[0] for entered in contexts] == [format] * 2
    assert recipe == "none" or [entered[1] for entered in contexts] == [recipe] * 2


def test_the_log_says_once_whose_linear_layers_are_made(groups, contexts, monkeypatch):
    told = []
    monkeypatch.setattr(tensor_parallel.logger, "info", lambda text, *values: told.append(text % values))
    tensor_parallel._say.cache_clear()
    for parallel in (ParallelConfig(), TE, TE.model_copy(update={"fp8_recipe": "none"})):
        make(groups, parallel)
    whose = "linear layers: Transformer Engine's (parallel.transformer_impl)"
    assert told == [
        "linear layers: megatron-core's own (parallel.transformer_impl)", f"{whose}, in FP8: e4m3, recipe blockwise",
        whose,
    ]  # fmt: skip


def test_a_recompute_enters_it_again(groups, contexts):
    from megacogvx.parallel.recompute import recompute

    mlp = make(groups, TE).blocks["0"].mlp
    out = recompute(mlp, torch.ones(4, 1, CONFIG.hidden_size, requires_grad=True))
    assert len(contexts) == 2
    out.sum().backward()
    assert len(contexts) == 4
