"""The way of `packed_attention` on the CPU equals the definition, and keeps its output once."""

import pytest
import torch

from megacogvx import draws
from megacogvx.testing.tolerance import assert_close
from megacogvx_kernels.packed_attention import on_cpu, packed_attention, reference

HEADS, WIDTH = 2, 8
PACKS = {
    "runs, an empty sample and padding": ((0, 5, 10, 10, 13, 14, 15, 22), 25),
    "equal samples that fill the pack": ((0, 6, 12, 18), 18),
    "one sample": ((0, 7), 7),
}


def _qkv(tokens, dtype=torch.float32):
    """Return q and k as they come, v a slice of qkv, as in the model."""
    q, k = (draws.normal((tokens, HEADS, WIDTH), 0, name).to(dtype) for name in "qk")
    v = draws.normal((tokens, HEADS, 3, WIDTH), 0, "v").to(dtype)[:, :, 2]
    return [x.requires_grad_() for x in (q, k, v)]


def test_samples_of_one_length_that_follow_each_other_are_one_run():
    boundaries, _ = PACKS["runs, an empty sample and padding"]
    runs = [(run.start, run.stop, count) for run, count in on_cpu.runs_of_equal_samples(boundaries)]
    assert runs == [(0, 10, 2), (10, 13, 1), (13, 15, 2), (15, 22, 1)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pack", PACKS)
def test_equals_the_definition_with_gradients(pack, dtype):
    boundaries, tokens = PACKS[pack]
    results = []
    for function in (packed_attention, reference.packed_attention):
        leaves = _qkv(tokens, dtype)
        out = function(*leaves, boundaries)
        out.backward(draws.normal((tokens, HEADS, WIDTH), 1, "cotangent").to(dtype))
        results.append([out, *(leaf.grad for leaf in leaves)])
    bound = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    for name, actual, expected in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        assert actual.dtype == dtype and not actual[boundaries[-1] :].any()
        assert_close(actual, expected, bound, name)


def test_a_pack_of_nothing_but_padding_is_zeros_without_gradient():
    leaves = _qkv(4)
    out = packed_attention(*leaves, (0, 0))
    out.sum().backward()
    assert not any(x.any() for x in (out, *(leaf.grad for leaf in leaves)))


@pytest.mark.parametrize("pack", PACKS)
def test_the_output_is_kept_once(pack):
    boundaries, tokens = PACKS[pack]
    kept = {}
    q, k, v = _qkv(tokens)

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = packed_attention(q, k, v, boundaries)
        out * out  # what reads it keeps it, too
    log_sums = boundaries[-1] * HEADS * 4
    assert sum(kept.values()) == sum(x.untyped_storage().nbytes() for x in (q, k, v)) + out.nbytes + log_sums
