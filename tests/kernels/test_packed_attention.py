from itertools import pairwise

import torch

from megacogvx import draws
from megacogvx.testing.tolerance import assert_close
from megacogvx_kernels.packed_attention import packed_attention

TOKENS, HEADS, WIDTH = 20, 2, 8
BOUNDARIES = (0, 7, 7, 8, 16)  # an empty sample, one of a single token, and four tokens of padding


def _qkv(dtype=torch.float32):
    return [draws.normal((TOKENS, HEADS, WIDTH), 0, name).to(dtype).requires_grad_() for name in "qkv"]


def _definition(q, k, v):
    """One softmax over the whole pack in fp64, everything outside of the sample masked."""
    sample = torch.full((TOKENS,), -1)
    for place, (start, stop) in enumerate(pairwise(BOUNDARIES)):
        sample[start:stop] = place
    allowed = (sample[:, None] == sample[None]) & (sample >= 0)[:, None]
    scores = torch.einsum("snk,tnk->nst", q.double(), k.double()) / WIDTH**0.5
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("nst,tnk->snk", weights, v.double())


def test_equals_the_masked_definition_with_gradients():
    results = []
    for function in (lambda *x: packed_attention(*x, BOUNDARIES), _definition):
        qkv = _qkv()
        out = function(*qkv)
        (out * draws.normal((TOKENS, HEADS, WIDTH), 1, "cotangent")).sum().backward()
        results.append([out, *(leaf.grad for leaf in qkv)])
    for name, actual, expected in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        assert_close(actual, torch.nan_to_num(expected), 1e-5, name)


def test_padding_is_zero_and_influences_nothing():
    q, k, v = _qkv()
    out = packed_attention(q, k, v, BOUNDARIES)
    assert not out[16:].any()
    with torch.no_grad():
        for x in (q, k, v):
            x[16:] = torch.nan
    assert torch.equal(packed_attention(q, k, v, BOUNDARIES), out)


def test_bf16_keeps_its_dtype():
    out = packed_attention(*_qkv(torch.bfloat16), BOUNDARIES)
    assert out.dtype == torch.bfloat16
    assert_close(out, packed_attention(*_qkv(), BOUNDARIES), 2e-2)
