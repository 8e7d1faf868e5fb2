"""Which kernel answers, and with which arguments: the packages that aren't here are played by fakes.

The fakes take exactly the arguments of the real functions and compute with the reference, so that a wrong one shows.
The tests with the mark `gpu` hold the real kernels to the reference.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from megacogvx import draws
from megacogvx.testing.tolerance import assert_close
from megacogvx_kernels import packed_attention as op
from megacogvx_kernels.packed_attention import backends, block, choice, reference
from megacogvx_kernels.packed_attention.block import CHUNK, _plain, _plain_backward, attend_block, attend_block_backward

TOKENS, HEADS, WIDTH = 20, 2, 8
BOUNDARIES = (0, 7, 7, 8, 16)  # an empty sample, one of a single token, and four tokens of padding
CU_SEQLENS = torch.tensor(BOUNDARIES, dtype=torch.int32)


def qkv(device="cpu", dtype=torch.float32, tokens=TOKENS, heads=HEADS, width=WIDTH):
    shape = (tokens, heads, width)
    return tuple(draws.normal(shape, 0, name).to(device, dtype).requires_grad_() for name in "qkv")


def in_samples(q, k, v, cu_seqlens):
    """What a kernel for sequences of unequal length gives; it must not get to see the padding."""
    assert len(q) == int(cu_seqlens[-1])
    return reference.packed_attention(q, k, v, cu_seqlens.tolist())


def module(name, **members):
    made = ModuleType(name)
    vars(made).update(members)
    return made


class FakeTE:
    """`DotProductAttention` as Transformer Engine 2.x declares it, in what is used."""

    made = 0

    def __init__(self, num_attention_heads, kv_channels, num_gqa_groups=None, attention_dropout=0.0,
                 qkv_format="sbhd", attn_mask_type="causal"):  # fmt: skip
        assert (num_attention_heads, kv_channels, attention_dropout) == (HEADS, WIDTH, 0.0)
        FakeTE.made += 1

    def __call__(self, query_layer, key_layer, value_layer, attention_mask=None, *, qkv_format, cu_seqlens_q,
                 cu_seqlens_kv, max_seqlen_q, max_seqlen_kv, attn_mask_type):  # fmt: skip
        assert (qkv_format, attn_mask_type, max_seqlen_q, max_seqlen_kv) == ("thd", "padding", 8, 8)
        assert cu_seqlens_q is CU_SEQLENS and cu_seqlens_kv is CU_SEQLENS
        return in_samples(query_layer, key_layer, value_layer, cu_seqlens_q).flatten(1)


def fake_flash2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
                causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
                return_attn_probs=False, block_table=None):  # fmt: skip
    assert (max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal) == (8, 8, 0.0, None, False)
    assert cu_seqlens_q is CU_SEQLENS and cu_seqlens_k is CU_SEQLENS
    return in_samples(q, k, v, cu_seqlens_q)


def fake_flash3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
                softmax_scale=None, causal=False, qv=None):  # fmt: skip
    assert (max_seqlen_q, max_seqlen_k, seqused_q, seqused_k, causal) == (8, 8, None, None, False)
    return in_samples(q, k, v, cu_seqlens_q), "lse, in older versions"


def fake_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                window_size=(-1, -1), enable_gqa=False):  # fmt: skip
    assert (max_q, max_k, scale, window_size) == (8, 8, None, (-1, -1))
    assert cu_seq_q is CU_SEQLENS and cu_seq_k is CU_SEQLENS
    return in_samples(query, key, value, cu_seq_q)


@pytest.fixture
def fakes(monkeypatch):
    """All packages there, on a GPU that isn't."""
    te = module("transformer_engine.pytorch", DotProductAttention=FakeTE)
    made = {
        "flash_attn": module("flash_attn", flash_attn_varlen_func=fake_flash2),
        "flash_attn_interface": module("flash_attn_interface", flash_attn_varlen_func=fake_flash3),
        "transformer_engine": module("transformer_engine", pytorch=te),
        "transformer_engine.pytorch": te,
    }
    for name, fake in made.items():
        monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", fake_varlen)
    backends._te_module.cache_clear()
    FakeTE.made = 0
    yield
    backends._te_module.cache_clear()


@pytest.mark.parametrize("name", [name for name in op.BACKENDS if name != "cudnn"])  # torch's: below
def test_a_backend_gets_its_arguments_and_never_the_padding(name, fakes):
    packed = backends.Packed(BOUNDARIES, CU_SEQLENS)
    for _ in range(2):
        results = []
        for attend in (
            lambda *x: backends.attend(name, x, packed),
            lambda *x: reference.packed_attention(*x, BOUNDARIES),
        ):
            tensors = qkv()
            out = attend(*tensors)
            out.square().sum().backward()
            results.append((out, *(leaf.grad for leaf in tensors)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), name
        assert not results[0][0][16:].any()
    assert FakeTE.made == (name == "transformer_engine")  # one module for all layers


def test_cudnn_is_asked_for_one_dense_call_a_sample(monkeypatch):
    calls = []

    def attend(q, k, v):
        assert _cur_sdpa_kernel_backends(with_priority=True) == [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
        calls.append(tuple(q.shape))
        return v

    monkeypatch.setattr(reference.F, "scaled_dot_product_attention", attend)
    backends.attend("cudnn", qkv(), backends.Packed(BOUNDARIES, CU_SEQLENS))
    assert calls == [(1, HEADS, stop - start, WIDTH) for start, stop in pairwise(BOUNDARIES) if stop > start]
    assert torch.backends.cuda.math_sdp_enabled()


@pytest.mark.parametrize("name", ["cudnn", "flash2"])
def test_the_output_of_a_kernel_is_kept_as_the_joined_one_alone(name, fakes, monkeypatch):
    parts, alive, results = [], [], []

    def kernel(q, k, v, *_, **__):
        out = F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)))[0].transpose(0, 1)
        parts.append(StorageWeakRef(out.untyped_storage()))
        return out

    def definition(name, tensors, packed):
        return reference.packed_attention(*tensors, packed.boundaries)

    monkeypatch.setattr(reference, "_attend", kernel)
    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_varlen_func", kernel)
    boundaries = BOUNDARIES if name == "cudnn" else (0, BOUNDARIES[-1])
    for attend in (definition, backends.attend):
        parts.clear()
        tensors = qkv()
        out = attend(name, tensors, backends.Packed(boundaries, CU_SEQLENS))
        read = out * out  # what reads it keeps it, too
        alive.append(any(not part.expired() for part in parts))
        read.sum().backward()
        results.append((out, *(leaf.grad for leaf in tensors)))
    assert alive == [True, False]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def tensor(dtype=torch.bfloat16, device="cuda", heads=48):
    """What the choice looks at: shape, dtype, device."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(700_000, heads, 64))


LONG, SHORT = (0, 85_906, 171_812), tuple(range(0, 25_001, 500))


@pytest.mark.parametrize(
    ("capability", "installed", "boundaries", "changes", "chosen"),
    [
        ((9, 0), (), LONG, {}, "cudnn"),
        ((9, 0), (), SHORT, {}, "varlen"),
        ((9, 0), ("flash2",), SHORT, {}, "flash2"),
        ((9, 0), ("flash2",), LONG, {}, "cudnn"),
        ((9, 0), ("flash3", "flash2"), LONG, {}, "flash3"),
        ((9, 0), ("flash3", "flash2"), SHORT, {}, "flash3"),
        ((8, 0), ("flash2",), LONG, {}, "flash2"),
        ((8, 0), (), LONG, {}, "varlen"),
        ((9, 0), ("flash3",), LONG, {"dtype": torch.float32}, "reference"),
        ((9, 0), ("flash3",), LONG, {"device": "cpu"}, "reference"),
        # heads cut over many ranks leave too little for a call a sample
        ((9, 0), (), (0, 5_218, 10_436), {"heads": 48}, "cudnn"),
        ((9, 0), (), (0, 5_218, 10_436), {"heads": 6}, "varlen"),
    ],
)
def test_the_choice_for_a_pack(monkeypatch, capability, installed, boundaries, changes, chosen):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    there = {"reference", "cudnn", "varlen", *installed}
    monkeypatch.setattr(choice, "missing", lambda name: "" if name in there else "not there")
    found = choice.choose_backend(tensor(**changes), boundaries)
    assert found.name == chosen and found.why


def test_one_asked_for_is_taken_or_refused_by_name(monkeypatch):
    q, k, v = qkv()
    assert torch.equal(
        op.packed_attention(q, k, v, BOUNDARIES, backend="reference"), op.packed_attention(q, k, v, BOUNDARIES)
    )
    with pytest.raises(ValueError, match="backend='flash' is not one of auto, reference, cudnn, flash2"):
        op.packed_attention(q, k, v, BOUNDARIES, backend="flash")
    monkeypatch.setattr(choice, "missing", lambda name: "")
    with pytest.raises(ValueError, match=r"backend=varlen takes bf16 or fp16 on a GPU, not torch\.float32 on cpu"):
        op.packed_attention(q, k, v, BOUNDARIES, backend="varlen")
    assert choice.choose_backend(tensor(), SHORT, "cudnn").name == "cudnn"


def test_what_a_backend_lacks_is_said(monkeypatch):
    backends.missing.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backends.missing("reference") == ""
    assert "no GPU" in backends.missing("cudnn") and "no GPU" in backends.missing("varlen")
    monkeypatch.setattr(
        backends.importlib.util, "find_spec", lambda name: None if name == "flash_attn_interface" else name
    )
    assert backends.missing("flash3") == "the module flash_attn_interface can't be found"
    backends.missing.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert backends.missing("cudnn") == "torch was built without cuDNN"
    assert backends.missing("flash3") == "the GPU is older than Hopper" and not backends.missing("flash2")
    backends.missing.cache_clear()


def merged(attend, backward, keys=13, dtype=torch.float32):
    """Output, and the gradients of one cotangent, of attention to two parts of the keys."""
    q, k, v = (
        draws.normal((rows, HEADS, WIDTH), 0, name).to(dtype) for rows, name in ((5, "q"), (keys, "k"), (keys, "v"))
    )
    cotangent = draws.normal((5, HEADS, WIDTH), 1, "cotangent").to(dtype)
    cuts = [slice(0, 4), slice(4, keys)]
    parts = [attend(q, k[cut], v[cut]) for cut in cuts]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    out = sum(part.float() * (part_lse - lse).exp()[..., None] for part, part_lse in parts).to(dtype)
    gradients = [backward(cotangent, q, k[cut], v[cut], out, lse) for cut in cuts]
    dq = gradients[0][0] + gradients[1][0]
    return (q, k, v, cotangent), (out, dq, *(torch.cat([g[i] for g in gradients]) for i in (1, 2)))


def plain(*tensors):
    return tuple(x[0].transpose(0, 1) for x in _plain(*(t.transpose(0, 1)[None] for t in tensors)))


def plain_backward(*tensors):
    *five, lse = tensors
    grads = _plain_backward(*(t.transpose(0, 1)[None] for t in five), lse.transpose(0, 1)[None])
    return tuple(x[0].transpose(0, 1) for x in grads)


@pytest.mark.parametrize("chunk", [CHUNK, 2])
@pytest.mark.parametrize(
    "functions", [(attend_block, attend_block_backward), (plain, plain_backward)], ids=["op", "plain"]
)
def test_parts_of_the_keys_merge_into_attention_to_all(functions, chunk, monkeypatch):
    monkeypatch.setattr("megacogvx_kernels.packed_attention.block.CHUNK", chunk)
    (q, k, v, cotangent), results = merged(*functions)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    weights = (torch.einsum("snk,tnk->nst", *leaves[:2]) / WIDTH**0.5).softmax(-1)
    expected = torch.einsum("nst,tnk->snk", weights, leaves[2])
    expected.backward(cotangent.double())
    for name, actual, wanted in zip(
        ("out", "dq", "dk", "dv"), results, (expected, *(x.grad for x in leaves)), strict=True
    ):
        assert_close(actual, wanted, 1e-6, name)


@pytest.mark.parametrize("kernel", ["flash", "cudnn"])
def test_the_operators_of_a_gpu_take_these_arguments(kernel, monkeypatch):
    """Shapes alone, by torch's own rules for tensors without memory."""
    monkeypatch.setattr("megacogvx_kernels.packed_attention.block._kernel", lambda q, k: kernel)
    q, k, v = (torch.empty(rows, HEADS, 64, device="meta", dtype=torch.bfloat16) for rows in (5, 9, 9))
    out, lse = attend_block(q, k, v)
    assert out.shape == q.shape and out.dtype == q.dtype and lse.shape == (5, HEADS) and lse.dtype == torch.float32
    gradients = attend_block_backward(out, q, k, v, out, lse)
    assert [gradient.shape for gradient in gradients] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize(("queries", "keys", "kernel"), [(1, 9, "flash"), (9, 1, "flash"), (2, 2, "cudnn")])
def test_a_single_token_never_reaches_cudnn(queries, keys, kernel, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    q, k = (torch.empty(rows, HEADS, 64, device="meta", dtype=torch.bfloat16) for rows in (queries, keys))
    assert block._kernel(q, k) == kernel


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in op.BACKENDS if name != "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_kernel_equals_the_reference(name, dtype):
    if problem := op.missing(name):
        pytest.skip(problem)
    boundaries, results = (0, 700, 700, 701, 1500), []
    for device, kind, backend in (("cuda", dtype, name), ("cpu", torch.float32, "reference")):
        tensors = tuple(x.detach().to(dtype).to(kind).requires_grad_() for x in qkv(device, tokens=1536, width=64))
        out = op.packed_attention(*tensors, boundaries, backend=backend)
        out.backward(draws.normal(tuple(out.shape), 1, "cotangent").to(device, kind))
        results.append((out, *(leaf.grad for leaf in tensors)))
    for what, actual, expected in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        assert_close(actual.cpu(), expected, 2e-2, what)
        assert not actual[1500:].any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_parts_merge_on_a_gpu(dtype, monkeypatch):
    _, expected = merged(plain, plain_backward)
    moved = {
        f: lambda *x, f=f: tuple(y.cpu() for y in f(*(t.cuda() for t in x)))
        for f in (attend_block, attend_block_backward)
    }
    _, results = merged(*moved.values(), dtype=dtype)
    for what, actual, wanted in zip(("out", "dq", "dk", "dv"), results, expected, strict=True):
        assert_close(actual, wanted, 1e-5 if dtype == torch.float32 else 3e-2, what)
