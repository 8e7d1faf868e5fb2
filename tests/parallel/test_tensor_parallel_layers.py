"""Tensor, sequence and context parallel layers on two ranks equal the plain layers on one."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from megacogvx.testing.spawn import on_ranks
from megacogvx.testing.tolerance import assert_close

TP2 = {"tensor_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
BOUND = 1e-5
TOKENS, WIDTH, INNER, SAMPLES = 8, 6, 10, 3


def _linears(groups, sequence_parallel):
    """A column and a row linear, and the plain linears whose shards they hold."""
    from megacogvx.parallel.config import ParallelConfig
    from megacogvx.parallel.megatron import plain_core_config
    from megacogvx.parallel.tensor_parallel import column_linear, row_linear

    core = plain_core_config(ParallelConfig(tensor_parallel_size=groups.tensor[1]), groups, torch.float32)
    core.sequence_parallel = sequence_parallel
    torch.manual_seed(1)
    plain = nn.Linear(WIDTH, INNER).to(groups.device), nn.Linear(INNER, WIDTH).to(groups.device)
    cut = column_linear(WIDTH, INNER, core, groups), row_linear(INNER, WIDTH, core, groups)
    for mine, whole in zip(cut, plain, strict=True):
        fill(mine.to(groups.device), whole, groups)
    return plain, cut, core


def fill(module, whole, groups):
    """Give `module` the shards of the parameters of `whole` that this rank holds."""
    from megacogvx.parallel.tensor_parallel import shard_of

    for mine, full in zip(module.parameters(), whole.parameters(), strict=True):
        mine.data.copy_(shard_of(full.data, mine, groups))


def assert_gradients(module, whole, groups):
    """Hold the gradients of `module` to this rank's shards of those of `whole`; sum those marked to be summed."""
    from megacogvx.parallel.data_parallel import sum_over_tokens
    from megacogvx.parallel.tensor_parallel import shard_of

    for (name, mine), full in zip(module.named_parameters(), whole.parameters(), strict=True):
        gradient = mine.grad
        if getattr(mine, "sequence_parallel", False):
            gradient = sum_over_tokens(gradient, groups)
        assert_close(gradient, shard_of(full.grad, mine, groups), BOUND, name)


def _run_linears(groups, sequence_parallel):
    plain, (column, row), _ = _linears(groups, sequence_parallel)
    x = torch.randn(TOKENS, 1, WIDTH).to(groups.device).requires_grad_()
    factor = torch.randn(TOKENS, 1, WIDTH).to(groups.device)
    y = plain[1](F.gelu(plain[0](x)))
    (y * factor).sum().backward()

    rank, size = groups.tensor
    mine = (lambda t: t.chunk(size)[rank]) if sequence_parallel else (lambda t: t)
    x_mine = mine(x.detach()).clone().requires_grad_()
    y_mine = row(F.gelu(column(x_mine)))
    (y_mine * mine(factor)).sum().backward()

    assert_close(y_mine, mine(y), BOUND, "y")
    assert_close(x_mine.grad, mine(x.grad), BOUND, "gradient of x")
    assert_gradients(column, plain[0], groups)
    assert_gradients(row, plain[1], groups)
    assert column.weight.tensor_model_parallel and column.weight.partition_dim == 0
    assert row.weight.tensor_model_parallel and row.weight.partition_dim == 1


@on_ranks(2, TP2)
def test_linears_with_sequence_parallelism(groups):
    _run_linears(groups, sequence_parallel=True)


@on_ranks(2, TP2)
def test_linears_without_sequence_parallelism(groups):
    _run_linears(groups, sequence_parallel=False)


@on_ranks(2, TP2)
def test_modulation_gradient_is_summed_over_token_shards(groups):
    from megacogvx.parallel.tensor_parallel import ModulationLinear

    for sequence_parallel in (True, False):
        _, _, core = _linears(groups, sequence_parallel)
        plain = nn.Linear(WIDTH, 2 * WIDTH).to(groups.device)
        modulation = ModulationLinear(WIDTH, 2 * WIDTH, core, groups).to(groups.device)
        fill(modulation, plain, groups)
        embedding = torch.randn(SAMPLES, WIDTH).to(groups.device).requires_grad_()
        rows = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2], device=groups.device)
        x = torch.randn(TOKENS, WIDTH).to(groups.device)

        scale, shift = plain(F.silu(embedding)).chunk(2, dim=-1)
        ((x * scale[rows] + shift[rows]) ** 2).sum().backward()

        rank, size = groups.tensor
        x_mine, rows_mine = (x.chunk(size)[rank], rows.chunk(size)[rank]) if sequence_parallel else (x, rows)
        copied = embedding.detach().clone().requires_grad_()
        scale, shift = modulation(F.silu(copied)).chunk(2, dim=-1)
        assert scale.shape == (SAMPLES, WIDTH)
        ((x_mine * scale[rows_mine] + shift[rows_mine]) ** 2).sum().backward()

        assert_gradients(modulation, plain, groups)
        assert_close(copied.grad, embedding.grad, BOUND, "gradient of the embedding")


@on_ranks(2, CP2)
def test_tokens_to_heads_is_exact_and_its_adjoint_is_the_way_back(groups):
    from megacogvx.parallel.context_parallel import heads_to_tokens, tokens_to_heads

    group, (rank, size) = groups.context_group, groups.context
    torch.manual_seed(2)
    whole, gradient = torch.randn(2, 6, 4, 5).to(groups.device)
    mine = whole.chunk(size, 0)[rank].clone().requires_grad_()
    heads = tokens_to_heads(mine, group)
    assert torch.equal(heads, whole.chunk(size, 1)[rank])
    heads.backward(gradient.chunk(size, 1)[rank])
    assert torch.equal(mine.grad, gradient.chunk(size, 0)[rank])

    back = heads.detach().requires_grad_()
    tokens = heads_to_tokens(back, group)
    assert torch.equal(tokens, mine)
    tokens.backward(gradient.chunk(size, 0)[rank])
    assert torch.equal(back.grad, gradient.chunk(size, 1)[rank])


@on_ranks(2, TP2)
def test_recompute_changes_no_bit(groups):
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from megacogvx.parallel.recompute import recompute

    _, (column, row), _ = _linears(groups, sequence_parallel=True)
    x = torch.randn(TOKENS // 2, 1, WIDTH).to(groups.device)
    conditioning = torch.randn(WIDTH).to(groups.device)

    def block(x, conditioning, factor):
        inner = F.gelu(column(x * conditioning))
        with get_cuda_rng_tracker().fork():
            inner = F.dropout(inner, 0.5)
        return x + factor * row(inner), inner

    def run(call):
        with get_cuda_rng_tracker().fork():
            pass
        states = copy.deepcopy(get_cuda_rng_tracker().get_states())
        column.zero_grad(), row.zero_grad()
        inputs = [x.clone().requires_grad_(), conditioning.clone().requires_grad_()]
        y, inner = call(*inputs)
        (y.square().sum() + inner.sum()).backward()
        get_cuda_rng_tracker().set_states(states)
        return [y, *(t.grad for t in inputs), *(p.grad.clone() for p in [*column.parameters(), *row.parameters()])]

    plain = run(lambda a, b: block(a, b, 0.5))
    again = run(lambda a, b: recompute(block, a, b, 0.5))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    with torch.no_grad():
        recompute(block, x, conditioning, 0.5)
    with pytest.raises(AssertionError, match="none of whose inputs"):
        recompute(block, x, conditioning, 0.5)
    with pytest.raises(AssertionError, match="parameter"):
        recompute(lambda x: (x * 2, row.bias), x.clone().requires_grad_())
