"""`causal_halo` and `group_norm_moments` with the frames of a clip on several ranks equal one process with all."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from megacogvx import draws
from megacogvx.testing.spawn import on_ranks
from megacogvx.testing.tolerance import assert_close
from megacogvx_kernels.causal_halo import causal_halo, start_halo
from megacogvx_kernels.group_norm_moments import group_norm_moments

CUTS = ((3, 2, 4), (1, 1, 1), (1, 3, 1), (2, 1, 1), (4, 1, 2))  # frames of each rank
CUTS_OF = {2: ((3, 2), (1, 1)), 3: CUTS, 4: ((2, 1, 3, 1), (1, 1, 1, 1))}
BATCH, CHANNELS = 2, 4


def _cut(x, counts, rank):
    start = sum(counts[:rank])
    return x[:, :, start : start + counts[rank]]


def _leaf(x):
    return x.detach().clone().requires_grad_()


def _stack(x, weights, halo):
    """Two convolutions: of one alone, the weight's gradient is right even where the halo's gradient is dropped."""
    for weight in weights:
        x = F.conv3d(halo(x), weight, padding=(0, 1, 1)).tanh()
    return x


@on_ranks(2, {"context_parallel_size": 2})
def test_stacked_causal_convolutions_over_two(groups):
    _stacked_causal_convolutions(groups)


@on_ranks(3, {"context_parallel_size": 3})
def test_stacked_causal_convolutions(groups):
    _stacked_causal_convolutions(groups)


@on_ranks(4, {"context_parallel_size": 4})
def test_stacked_causal_convolutions_over_four(groups):
    _stacked_causal_convolutions(groups)


def _stacked_causal_convolutions(groups):
    """In fp64, so that nothing hides in rounding."""
    from torch.distributed import all_reduce

    group, (rank, ranks) = groups.context_group, groups.context
    for counts, size in itertools.product(CUTS_OF[ranks], (1, 2, 4)):
        whole = _leaf(draws.normal((BATCH, CHANNELS, sum(counts), 5, 4), 0, "x").double().to(groups.device))
        mine = _leaf(_cut(whole, counts, rank))
        shape = (CHANNELS, CHANNELS, size + 1, 3, 3)
        weights = [draws.normal(shape, 0, "w", i).double().to(groups.device) / 10 for i in range(3)]
        theirs, ours = [_leaf(w) for w in weights], [_leaf(w) for w in weights]
        expected = _stack(whole, theirs, lambda x, size=size: causal_halo(x, size))
        actual = _stack(mine, ours, lambda x, size=size: causal_halo(x, size, group=group))
        name = f"size {size} over {counts}:"
        assert_close(actual, _cut(expected, counts, rank), 1e-13, name)
        gradient = draws.normal(tuple(expected.shape), 0, "gradient").to(expected)
        expected.backward(gradient)
        actual.backward(_cut(gradient, counts, rank))
        assert_close(mine.grad, _cut(whole.grad, counts, rank), 1e-12, f"{name} gradient of x")
        for a, b in zip(ours, theirs, strict=True):
            all_reduce(a.grad, group=group)
            assert_close(a.grad, b.grad, 1e-12, f"{name} gradient of a weight")


@on_ranks(3, {"context_parallel_size": 3})
def test_halo_alone(groups):
    """Exact in every dtype; the gradient of a frame adds up all that saw it."""
    group, (rank, _) = groups.context_group, groups.context
    for counts, dtype in itertools.product(CUTS, (torch.float32, torch.bfloat16)):
        whole = _leaf(draws.normal((BATCH, CHANNELS, sum(counts), 3, 2), 0, "x").to(groups.device, dtype))
        mine, first = _leaf(_cut(whole, counts, rank)), sum(counts[:rank])
        padded = causal_halo(whole, 2)
        halo = start_halo(mine, 2, group).wait()
        assert torch.equal(halo, padded[:, :, first : first + 2])
        (halo.sum() * (rank + 1)).backward()
        gradient = torch.zeros_like(whole, dtype=torch.float32)
        for other in range(3):
            for frame in range(sum(counts[:other]) - 2, sum(counts[:other])):
                gradient[:, :, max(frame, 0)] += other + 1
        assert torch.equal(mine.grad.float(), _cut(gradient, counts, rank)), counts


@on_ranks(3, {"context_parallel_size": 3})
def test_group_norm(groups):
    """Held to the definition in fp64; a mean far from zero would cancel in a sum of squares."""
    from torch.distributed import all_reduce

    group, (rank, _) = groups.context_group, groups.context
    for counts, offset, activation in itertools.product(CUTS, (0.0, 100.0), (False, True)):
        drift = torch.arange(sum(counts)).view(-1, 1, 1) * 0.5  # ranks whose moments differ
        whole = _leaf(draws.normal((BATCH, CHANNELS, sum(counts), 5, 4), 0, "x") + drift + offset)
        scales = [draws.normal((CHANNELS,), 0, name) for name in ("weight", "bias")]
        theirs, ours = [_leaf(w.double()) for w in scales], [_leaf(w.to(groups.device)) for w in scales]
        mine = _leaf(_cut(whole, counts, rank).to(groups.device))
        expected = group_norm_moments(whole.double(), *theirs, 2, 1e-6, activation)
        actual = group_norm_moments(mine, *ours, 2, 1e-6, activation, group)
        name = f"{counts}, mean {offset}:"
        bound = 1e-5 if offset else 2e-6  # fp32 holds 100 + x to 4e-6
        assert_close(actual, _cut(expected, counts, rank), bound, name)
        gradient = draws.normal(tuple(expected.shape), 0, "gradient")
        expected.backward(gradient.double())
        actual.backward(_cut(gradient, counts, rank).to(actual))
        assert_close(mine.grad, _cut(whole.grad, counts, rank), 10 * bound, f"{name} gradient of x")
        for a, b in zip(ours, theirs, strict=True):
            all_reduce(a.grad, group=group)
            assert_close(a.grad, b.grad, 10 * bound, f"{name} gradient of weight or bias")


@on_ranks(3, {"context_parallel_size": 3})
def test_group_norm_of_constant_and_bf16_clips(groups):
    group, weight, bias = groups.context_group, torch.ones(CHANNELS), torch.full((CHANNELS,), 0.25)
    weight, bias = weight.to(groups.device), bias.to(groups.device)
    x = torch.full((1, CHANNELS, 2, 3, 3), 7.0, device=groups.device)
    assert torch.equal(group_norm_moments(x, weight, bias, 2, 1e-6, group=group), torch.full_like(x, 0.25))
    x = draws.normal((1, CHANNELS, 6, 3, 3), 0, "x").to(groups.device, torch.bfloat16)
    mine = _cut(x, (2, 2, 2), groups.context[0])
    y = group_norm_moments(mine, weight.bfloat16(), bias.bfloat16(), 2, 1e-6, group=group)
    assert y.dtype == torch.bfloat16
    expected = group_norm_moments(x.float(), weight, bias, 2, 1e-6)
    assert_close(y, _cut(expected, (2, 2, 2), groups.context[0]), 4e-3, "bf16")


@on_ranks(3, {"context_parallel_size": 3})
def test_wrong_arguments_are_named(groups):
    group, x = groups.context_group, torch.zeros(1, 1, 2, 2, 2)
    with pytest.raises(ValueError, match="previous_BCTHW and group"):
        causal_halo(x, 2, x, group)
    with pytest.raises(ValueError, match="size=0"):
        start_halo(x, 0, group)
    assert causal_halo(x, 0, group=group) is x
