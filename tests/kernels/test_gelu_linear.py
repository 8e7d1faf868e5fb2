"""`gelu_linear` equals GELU and a linear layer, and keeps the input of GELU alone."""

import pytest
import torch

from megacogvx import draws
from megacogvx.testing.tolerance import assert_close
from megacogvx_kernels.gelu_linear import gelu_linear, reference

TOKENS, INNER, WIDTH = 12, 20, 6
BOUND = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}


def _leaves(dtype=torch.float32, shape=(TOKENS, 1, INNER)):
    x, weight = (draws.normal(size, 0, name).to(dtype) for name, size in (("x", shape), ("w", (WIDTH, INNER))))
    return x.requires_grad_(), weight.requires_grad_()


@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@pytest.mark.parametrize("shape", [(TOKENS, 1, INNER), (TOKENS, INNER)], ids=["S1F", "SF"])
def test_equals_the_reference_with_gradients(dtype, shape):
    results = []
    for function, kind in ((gelu_linear, dtype), (reference.gelu_linear, torch.float64)):
        x, weight = _leaves(dtype, shape)
        x, weight = (leaf.detach().to(kind).requires_grad_() for leaf in (x, weight))
        out = function(x, weight)
        out.backward(draws.normal((*shape[:-1], WIDTH), 1, "cotangent").to(kind))
        results.append((out, x.grad, weight.grad))
    for name, actual, expected in zip(("out", "dx", "dw"), *results, strict=True):
        assert actual.dtype == dtype and actual.shape == expected.shape
        assert_close(actual, expected, BOUND[dtype], name)


@pytest.mark.parametrize("frozen", [0, 1], ids=["x", "weight"])
def test_what_needs_no_gradient_gets_none_and_changes_no_bit_of_the_other(frozen):
    gradients = []
    for leaves in (_leaves(), _leaves()):
        leaves[frozen].requires_grad_(not gradients)
        gelu_linear(*leaves).backward(draws.normal((TOKENS, 1, WIDTH), 1, "cotangent"))
        gradients.append(leaves[1 - frozen].grad)
    assert leaves[frozen].grad is None and torch.equal(*gradients)


def test_a_kept_gelu_changes_no_bit_and_is_not_computed_again(monkeypatch):
    calls, results = [], []
    gelu = torch.nn.functional.gelu
    monkeypatch.setattr("megacogvx_kernels.gelu_linear.F.gelu", lambda *x, **how: calls.append(1) or gelu(*x, **how))
    for keep_gelu in (False, True):
        x, weight = _leaves()
        out = gelu_linear(x * 1, weight, keep_gelu=keep_gelu)
        out.backward(draws.normal((TOKENS, 1, WIDTH), 1, "cotangent"))
        results.append((out, x.grad, weight.grad))
    assert len(calls) == 2 + 1
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_only_the_input_is_kept():
    kept = []
    x, weight = _leaves()
    inner = x * 1
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        gelu_linear(inner, weight)
    assert sorted(kept) == sorted([inner.data_ptr(), weight.data_ptr()])
