"""A wrong argument of an op: one exception that names it, word for word the same from every backend."""

import numpy as np
import pytest
import torch

from megacogvx_kernels import checks, compiled
from megacogvx_kernels.adaln import adaln_modulate, gated_residual, gated_residual_adaln
from megacogvx_kernels.causal_halo import causal_halo
from megacogvx_kernels.gelu_linear import gelu_linear
from megacogvx_kernels.group_norm_moments import group_norm_moments
from megacogvx_kernels.packed_attention import packed_attention
from megacogvx_kernels.qk_norm_rope import qk_norm_rope, take_v

S, N, K, D = 4, 2, 16, 16
QKV, TABLE, GRID = "qkv_SN3K", "sample_table_M5", "rope_grid_M6"
META, FLOAT8 = torch.device("meta"), torch.float8_e4m3fn


def _misaligned(*shape):
    """In the middle of its storage."""
    count = int(np.prod(shape))
    return torch.zeros(count + 1)[1:].view(shape)


def _misaligned_storage(*shape):
    """At the beginning of a storage that itself begins nowhere in particular, as memory of other programs does."""
    count = int(np.prod(shape))
    raw = np.zeros(4 * count + 64, dtype=np.uint8)
    first = (-raw.ctypes.data) % 16 + 4
    found = torch.from_numpy(raw[first : first + 4 * count].view(np.float32)).view(shape)
    assert found.storage_offset() == 0
    assert found.data_ptr() % 16 == 4
    return found


def _int(*rows):
    return torch.tensor(rows, dtype=torch.int32)


def _rope():
    vectors = {f"{part}_{kind}_K": torch.ones(K) for part in "qk" for kind in ("weight", "bias")}
    table = _int([0, 1, 1, 1, 1], [2, 9, 0, 0, 0])
    return {
        "qkv_SN3K": torch.zeros(S, N, 3, K), **vectors, "sample_table_M5": table,
        "rope_grid_M6": torch.zeros(2, 6), "token_offset": 0, "axes": (4, 6, 6),
    }  # fmt: skip


def _tokens():
    return {
        "residual_SD": torch.zeros(S, D), "branch_SD": torch.zeros(S, D),
        "gate_modulation_R3D": torch.zeros(2, 3, D), "weight_D": torch.zeros(D), "bias_D": torch.zeros(D),
        "modulation_R3D": torch.zeros(2, 3, D), "rows_S": torch.tensor([0, 1, 1, 0]), "eps": 1e-5,
    }  # fmt: skip


def _modulate():
    tokens = _tokens()
    x = tokens.pop("residual_SD")
    return {"x_SD": x, **{name: tokens[name] for name in ("weight_D", "bias_D", "modulation_R3D", "rows_S", "eps")}}


def _gate():
    return {name: x for name, x in _tokens().items() if name in ("residual_SD", "branch_SD", "rows_S")} | {
        "modulation_R3D": torch.zeros(2, 3, D)
    }


def _clip():
    return {
        "x_BCTHW": torch.zeros(1, 8, 2, 4, 4), "weight_C": torch.ones(8), "bias_C": torch.zeros(8), "groups": 2,
        "eps": 1e-6,
    }  # fmt: skip


def _halo():
    return {"x_BCTHW": torch.zeros(1, 1, 3, 2, 2), "size": 2}


def _attention():
    return {**{f"{name}_SNK": torch.zeros(S, N, K) for name in "qkv"}, "boundaries": (0, 3)}


def _inner():
    return {"x_SF": torch.zeros(S, 1, D), "weight_DF": torch.zeros(K, D)}


OPS = {
    "qk_norm_rope": (qk_norm_rope, _rope),
    "take_v": (take_v, lambda: {QKV: torch.zeros(S, N, 3, K)}),
    "adaln_modulate": (adaln_modulate, _modulate),
    "gated_residual": (gated_residual, _gate),
    "gated_residual_adaln": (gated_residual_adaln, _tokens),
    "group_norm_moments": (group_norm_moments, _clip),
    "causal_halo": (causal_halo, _halo),
    "packed_attention": (packed_attention, _attention),
    "gelu_linear": (gelu_linear, _inner),
}
FIVE = {name: torch.ones(15) for name in ("q_weight_K", "q_bias_K", "k_weight_K", "k_bias_K")}
ROPE = [  # what is wrong, what is raised, what it names
    ({QKV: torch.zeros(S, N, 3, K, dtype=torch.int32)}, TypeError, QKV),
    ({QKV: torch.zeros(S, N, 3, K, dtype=torch.complex64)}, TypeError, QKV),
    ({QKV: torch.zeros(S, N, 3, K).to(FLOAT8)}, TypeError, QKV),
    ({QKV: [1.0]}, TypeError, QKV),
    ({QKV: torch.zeros(0, N, 3, K)}, ValueError, QKV),
    ({QKV: torch.zeros(S, N, K, 3).transpose(2, 3)}, ValueError, QKV),
    ({QKV: _misaligned(S, N, 3, K)}, ValueError, QKV),
    ({QKV: _misaligned_storage(S, N, 3, K)}, ValueError, QKV),
    ({QKV: torch.zeros(S, N, 3, K, device=META)}, ValueError, "q_weight_K"),
    ({QKV: torch.zeros(S, N, 3, 15), **FIVE, "axes": (4, 6, 5)}, ValueError, "K=15"),
    ({QKV: torch.zeros(S, N, 3, 15), **FIVE, "rotate": False}, ValueError, "K=15"),
    ({"q_weight_K": torch.ones(K).to(FLOAT8)}, TypeError, "q_weight_K"),
    ({"k_weight_K": torch.zeros(K, dtype=torch.int64)}, TypeError, "k_weight_K"),
    ({"k_bias_K": torch.zeros(K, dtype=torch.float64)}, TypeError, "k_bias_K"),
    ({"k_bias_K": torch.zeros(K, device=META)}, ValueError, "k_bias_K"),
    ({TABLE: torch.zeros(0, 5, dtype=torch.int32), GRID: torch.zeros(0, 6)}, ValueError, f"{TABLE} has no samples"),
    ({TABLE: torch.zeros(2, 5, dtype=torch.int32, device=META)}, ValueError, TABLE),
    ({TABLE: torch.zeros(2, 5)}, TypeError, TABLE),
    ({TABLE: _int([0, 1, 1, 1, 1], [3, 9, 0, 0, 0])}, ValueError, f"{TABLE} doesn't add up"),
    ({TABLE: _int([0, 1, 1, 1, 1], [2, -9, 0, 0, 0])}, ValueError, f"{TABLE} doesn't add up"),
    ({TABLE: _int([0, 1, 1, 1, 1], [2, 1, 0, 0, 0])}, ValueError, f"{TABLE} covers 3 tokens"),
    ({TABLE: _int([0, 0, 2**11, 2**10, 2**10], [2**31 - 1, 9, 0, 0, 0])}, ValueError, TABLE),
    ({GRID: torch.zeros(2, 6, dtype=torch.int64)}, TypeError, GRID),
    ({GRID: torch.zeros(3, 6)}, ValueError, GRID),
    ({GRID: torch.zeros(2, 6, device=META)}, ValueError, GRID),
    ({"token_offset": 8}, ValueError, f"{TABLE} covers 11 tokens; asked for 8 to 12"),
    ({"token_offset": -1}, ValueError, "token_offset"),
    ({"token_offset": 0.0}, TypeError, "token_offset"),
    ({"axes": (4, 6, 5)}, ValueError, "axes"),
    ({"axes": (20, -2, -2)}, ValueError, "axes"),
    ({"axes": (8, 8)}, ValueError, "axes"),
    ({"theta": 0.0}, ValueError, "theta"),
    ({"eps": 0.0}, ValueError, "eps"),
]
TAKE_V = [
    ({QKV: torch.zeros(S, N, 3, K, dtype=torch.int32)}, TypeError, QKV),
    ({QKV: [1.0]}, TypeError, QKV),
    ({QKV: torch.zeros(S, 3 * N * K)}, ValueError, QKV),
    ({QKV: torch.zeros(S, N, 2, K)}, ValueError, QKV),
    ({QKV: torch.zeros(0, N, 3, K)}, ValueError, QKV),
]
TABLES = [
    ({"modulation_R3D": torch.zeros(3, 3, D + 1)}, ValueError, "modulation_R3D"),
    ({"modulation_R3D": torch.zeros(2, 3, D, dtype=torch.int32)}, TypeError, "modulation_R3D"),
    ({"modulation_R3D": torch.zeros(2, 1, D)}, ValueError, "modulation_R3D"),
    ({"modulation_R3D": torch.zeros(2, 3, D, device=META)}, ValueError, "modulation_R3D"),
    ({"rows_S": torch.tensor([0, 1, 2, 0])}, ValueError, "rows_S"),
    ({"rows_S": torch.tensor([0, 1, -1, 0])}, ValueError, "rows_S"),
    ({"rows_S": torch.zeros(S)}, TypeError, "rows_S"),
    ({"rows_S": torch.zeros(3, dtype=torch.int64)}, ValueError, "rows_S"),
    ({"rows_S": [0, 1, 1, 0]}, TypeError, "rows_S"),
    ({"rows_S": torch.zeros(S, dtype=torch.int64, device=META)}, ValueError, "rows_S"),
]
GATES = [
    ({name.replace("mod", "gate_mod"): x for name, x in change.items()}, error, named.replace("mod", "gate_mod"))
    for change, error, named in TABLES[:4]
]
AFFINE = [
    ({"weight_D": torch.zeros(D, dtype=torch.int64)}, TypeError, "weight_D"),
    ({"weight_D": torch.zeros(D + 1)}, ValueError, "weight_D"),
    ({"bias_D": torch.zeros(D, dtype=torch.float64)}, TypeError, "bias_D"),
    ({"bias_D": torch.zeros(D, device=META)}, ValueError, "bias_D"),
    ({"eps": 0.0}, ValueError, "eps"),
]


def _of_tokens(*names):
    """What may be wrong with tokens of any name."""
    for name in names:
        yield {name: torch.zeros(S, D, dtype=torch.int32)}, TypeError, name
        yield {name: torch.zeros(S, D).to(FLOAT8)}, TypeError, name
        yield {name: [1.0]}, TypeError, name
        yield {name: torch.zeros(D, S).T}, ValueError, name
        yield {name: _misaligned(S, D)}, ValueError, name
        yield {name: _misaligned_storage(S, D)}, ValueError, name
        yield {name: torch.zeros(S, 2, D)}, ValueError, name
        yield {name: torch.zeros(0, D)}, ValueError, name
    nothing = dict.fromkeys(names, torch.zeros(0, D))
    yield {**nothing, "rows_S": torch.zeros(0, dtype=torch.int64)}, ValueError, f"{names[0]} has the shape"
    yield {"rows_S": torch.zeros(0, dtype=torch.int64)}, ValueError, "rows_S"
    yield {"modulation_R3D": torch.zeros(0, 3, D)}, ValueError, "the table has 0 rows"
    yield {names[-1]: torch.zeros(S, D, device=META)}, ValueError, "must be on one device"


CLIP = [
    ({"x_BCTHW": torch.zeros(1, 8, 2, 4, 4, dtype=torch.int64)}, TypeError, "x_BCTHW"),
    ({"x_BCTHW": torch.zeros(1, 8, 2, 4, 4).to(FLOAT8)}, TypeError, "x_BCTHW"),
    ({"x_BCTHW": [1.0]}, TypeError, "x_BCTHW"),
    ({"x_BCTHW": torch.zeros(8, 2, 4, 4)}, ValueError, "x_BCTHW"),
    ({"x_BCTHW": torch.zeros(1, 8, 0, 4, 4)}, ValueError, "x_BCTHW"),
    ({"x_BCTHW": torch.zeros(1, 8, 2, 4, 4, device=META)}, ValueError, "weight_C"),
    ({"weight_C": torch.ones(8, dtype=torch.int32)}, TypeError, "weight_C"),
    ({"weight_C": torch.ones(9)}, ValueError, "weight_C"),
    ({"bias_C": torch.zeros(8, dtype=torch.float64)}, TypeError, "bias_C"),
    ({"bias_C": torch.zeros(8, device=META)}, ValueError, "bias_C"),
    ({"groups": 3}, ValueError, "groups"),
    ({"groups": 0}, ValueError, "groups"),
    ({"groups": 2.0}, TypeError, "groups"),
    ({"eps": 0.0}, ValueError, "eps"),
    ({"eps": float("nan")}, ValueError, "eps"),
]
HALO = [
    ({"x_BCTHW": torch.zeros(1, 1, 1, 2, 2, dtype=torch.int64)}, TypeError, "x_BCTHW"),
    ({"x_BCTHW": torch.zeros(1, 1, 1, 2, 2).to(FLOAT8)}, TypeError, "x_BCTHW"),
    ({"x_BCTHW": [1.0]}, TypeError, "x_BCTHW"),
    ({"x_BCTHW": torch.zeros(1, 2, 2, 2)}, ValueError, "x_BCTHW"),
    ({"x_BCTHW": torch.zeros(1, 1, 0, 2, 2)}, ValueError, "x_BCTHW .* at least one frame"),
    ({"x_BCTHW": torch.zeros(0, 1, 1, 2, 2)}, ValueError, "x_BCTHW"),
    ({"size": -1}, ValueError, "size=-1"),
    ({"size": 1.5}, TypeError, "size"),
    ({"size": True}, TypeError, "size"),
    ({"previous_BCTHW": torch.zeros(1, 1, 3, 2, 2)}, ValueError, "previous_BCTHW"),
    ({"previous_BCTHW": torch.zeros(1, 1, 2, 2, 2).half()}, TypeError, "previous_BCTHW"),
    ({"previous_BCTHW": torch.zeros(1, 1, 2, 2, 2, device=META)}, ValueError, "previous_BCTHW"),
]
ATTENTION = [
    ({"boundaries": (1, 3)}, ValueError, "boundaries"),
    ({"boundaries": (0, 3, 2)}, ValueError, "boundaries"),
    ({"boundaries": (0, S + 1)}, ValueError, "boundaries"),
    ({"boundaries": (0,)}, ValueError, "no samples"),
    ({"boundaries": ()}, ValueError, "no samples"),
    ({"boundaries": (0, 2.5)}, TypeError, "boundaries"),
    ({"q_SNK": torch.zeros(S, N * K)}, ValueError, "q_SNK"),
    ({"q_SNK": torch.zeros(0, N, K)}, ValueError, "q_SNK"),
    ({f"{name}_SNK": torch.zeros(0, N, K) for name in "qkv"}, ValueError, "q_SNK"),
    ({f"{name}_SNK": torch.zeros(S, N, 15) for name in "qkv"}, ValueError, "q_SNK has heads of K=15"),
    ({"q_SNK": torch.zeros(S, N, K, dtype=torch.int64)}, TypeError, "q_SNK"),
    ({"q_SNK": torch.zeros(S, N, K).to(FLOAT8)}, TypeError, "q_SNK"),
    ({"q_SNK": _misaligned(S, N, K)}, ValueError, "q_SNK"),
    ({"v_SNK": [1.0]}, TypeError, "v_SNK"),
    ({"v_SNK": torch.zeros(0, N, K)}, ValueError, "v_SNK"),
    ({"k_SNK": torch.zeros(S, K, N).transpose(1, 2)}, ValueError, "k_SNK"),
    ({"k_SNK": _misaligned_storage(S, N, K)}, ValueError, "k_SNK"),
    ({"k_SNK": torch.zeros(S, N, K).half()}, TypeError, "k_SNK"),
    ({"v_SNK": torch.zeros(S, N, K + 1)}, ValueError, "v_SNK"),
    ({"v_SNK": torch.zeros(S, N, K, device=META)}, ValueError, "v_SNK"),
    ({"cu_seqlens": torch.tensor([0, 3])}, TypeError, "cu_seqlens"),
    ({"cu_seqlens": _int(0, 2, 3)}, ValueError, "cu_seqlens"),
    ({"cu_seqlens": _int(0, 4)}, ValueError, r"cu_seqlens holds \(0, 4\); expected \(0, 3\)"),
    ({"cu_seqlens": torch.zeros(2, dtype=torch.int32, device=META)}, ValueError, "cu_seqlens"),
    ({"backend": "fastest"}, ValueError, "backend"),
    ({"backend": "cudnn"}, ValueError, "backend"),
]
GELU = [
    ({"x_SF": torch.zeros(S, D, dtype=torch.int64)}, TypeError, "x_SF"),
    ({"x_SF": torch.zeros(S, D).to(FLOAT8)}, TypeError, "x_SF"),
    ({"x_SF": [1.0]}, TypeError, "x_SF"),
    ({"x_SF": torch.zeros(())}, ValueError, "x_SF"),
    ({"x_SF": torch.zeros(0, 1, D)}, ValueError, "x_SF"),
    ({"weight_DF": torch.zeros(K, D + 1)}, ValueError, "weight_DF"),
    ({"weight_DF": torch.zeros(K, D, dtype=torch.float64)}, TypeError, "weight_DF"),
    ({"weight_DF": torch.zeros(K, D, device=META)}, ValueError, "weight_DF"),
]
BAD = [
    *(("qk_norm_rope", *bad) for bad in ROPE),
    *(("take_v", *bad) for bad in TAKE_V),
    *(("adaln_modulate", *bad) for bad in (*_of_tokens("x_SD"), *AFFINE, *TABLES)),
    *(("gated_residual", *bad) for bad in (*_of_tokens("residual_SD", "branch_SD"), *TABLES)),
    *(("gated_residual_adaln", *bad) for bad in (*_of_tokens("residual_SD", "branch_SD"), *AFFINE, *TABLES)),
    *(("gated_residual_adaln", *bad) for bad in GATES),
    ("gated_residual_adaln", {"gate_modulation_R3D": torch.zeros(2, 2, D)}, ValueError, "gate_modulation_R3D"),
    ("gated_residual_adaln", {"gate_modulation_R3D": torch.zeros(3, 3, D)}, ValueError, "modulation_R3D has 2 rows"),
    *(("group_norm_moments", *bad) for bad in CLIP),
    *(("causal_halo", *bad) for bad in HALO),
    *(("packed_attention", *bad) for bad in ATTENTION),
    *(("gelu_linear", *bad) for bad in GELU),
]


def _complaint(function, arguments, error, named):
    with pytest.raises((TypeError, ValueError, RuntimeError), match=named) as caught:
        function(**arguments)
    assert type(caught.value) is error
    return str(caught.value)


@pytest.mark.parametrize("name", OPS)
def test_every_wrong_argument_is_named_alike_by_every_backend(need_compiled, name):
    function, good = OPS[name]
    for _, change, error, named in (bad for bad in BAD if bad[0] == name):
        from_compiled = _complaint(function, {**good(), **change}, error, named)
        with compiled.references_only():
            assert _complaint(function, {**good(), **change}, error, named) == from_compiled


@pytest.mark.parametrize("name", OPS)
def test_what_they_are_changes_of_is_right(name):
    function, good = OPS[name]
    function(**good())


def test_parameters_and_gradients_may_lie_anywhere():
    """Nobody lays them out by hand: a copy is made where a kernel couldn't read 16 bytes at a time."""
    for x in (_misaligned(4, 8), _misaligned_storage(4, 8), torch.zeros(8, 4).T):
        found = checks.packed(x)
        assert checks.is_aligned(found)
        assert found.is_contiguous()
        assert torch.equal(found, x)
    x = torch.zeros(4, 8)
    assert checks.packed(x) is x
    off = {**_tokens(), "weight_D": _misaligned(D), "modulation_R3D": _misaligned_storage(2, 3, D)}
    expected = gated_residual_adaln(**_tokens())
    assert all(torch.equal(a, b) for a, b in zip(gated_residual_adaln(**off), expected, strict=True))


def test_a_gpu_older_than_the_machine_code_gets_the_references(monkeypatch):
    monkeypatch.setattr(compiled, "_facts", lambda: {"cuda": ["sm_80", "sm_90", "sm_100"], "cpu": []})
    for capability, expected in (((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        compiled._runs_on.cache_clear()
        assert compiled._runs_on(torch.device("cuda", 0)) is expected
    compiled._runs_on.cache_clear()


def _rope_call(**change):
    all_of = {**_rope(), **change}
    tensors = [x for x in all_of.values() if isinstance(x, torch.Tensor)]
    return (*tensors, 0, 1e-6, *all_of["axes"][:2], 1e4, True)


def _modulate_call(**change):
    rows = torch.zeros(S, dtype=torch.int64)
    good = {"x": torch.zeros(S, D), "w": torch.zeros(D), "b": torch.zeros(D), "t": torch.zeros(1, 3, D), "rows": rows}
    runs = {"runs": torch.tensor([[0, S, 0]]), "starts": torch.tensor([0, 1])}
    return (*{**good, **runs, **change}.values(), 1e-5)


def _norm_call(**change):
    good = {"x": torch.zeros(1, 8, 16), "gradient": torch.zeros(1, 8, 16), "k": torch.zeros(1, 8, 6), "kind": 0}
    return (*{**good, "last": False, "silu": False, **change}.values(),)


DIRECT = [  # calls of torch.ops that the public functions would never make; none may read outside its tensors
    ("qk_norm_rope", _rope_call(qkv_SN3K=_misaligned(S, N, 3, K)), "qkv_SN3K"),
    ("qk_norm_rope", _rope_call(qkv_SN3K=torch.zeros(S, N, 3, K).double()), "qkv_SN3K"),
    ("qk_norm_rope", _rope_call(qkv_SN3K=torch.zeros(S, N, K, 3).transpose(2, 3)), "qkv_SN3K"),
    ("qk_norm_rope", _rope_call(q_bias_K=torch.zeros(K // 2)), "weights and biases"),
    ("qk_norm_rope", _rope_call(sample_table_M5=torch.zeros(0, 5, dtype=torch.int32)), "sample_table_M5"),
    ("qk_norm_rope", _rope_call(sample_table_M5=torch.zeros(2, 5, dtype=torch.int64)), "sample_table_M5"),
    ("qk_norm_rope", _rope_call(rope_grid_M6=torch.zeros(1, 6)), "rope_grid_M6"),
    ("qk_norm_rope", _rope_call(axes=(300, 2, 2)), "axes"),
    ("qk_norm_rope", _rope_call(qkv_SN3K=torch.zeros(0, N, 3, K)), "S and N at least 1"),
    ("qk_norm_rope", _rope_call(qkv_SN3K=torch.zeros(S, 0, 3, K)), "S and N at least 1"),
    ("adaln_modulate", _modulate_call(x=_misaligned(S, D)), "16 bytes"),
    ("adaln_modulate", _modulate_call(w=_misaligned(D)), "16 bytes"),
    ("adaln_modulate", _modulate_call(x=torch.zeros(D, S).T), "x_SD"),
    ("adaln_modulate", _modulate_call(w=torch.zeros(D - 8)), "weight_D"),
    ("adaln_modulate", _modulate_call(t=torch.zeros(1, 1, D)), "modulation table"),
    ("adaln_modulate", _modulate_call(rows=torch.zeros(S - 1, dtype=torch.int64)), "rows_S"),
    ("adaln_modulate", _modulate_call(rows=torch.zeros(S, dtype=torch.int32)), "rows_S"),
    ("group_norm", _norm_call(x=_misaligned(1, 8, 16)), "x must start"),
    ("group_norm", _norm_call(k=torch.zeros(1, 8, 5)), "coefficients"),
    ("group_norm", _norm_call(gradient=torch.zeros(1, 8, 8)), "group_norm"),
    ("group_norm", _norm_call(x=torch.zeros(1, 8, 15), gradient=torch.zeros(1, 8, 15)), "eights"),
    ("halo_pack", (torch.zeros(1, 2, 3, 4, 4), 2, 2), "frames"),
    ("halo_pack", (torch.zeros(1, 2, 3, 4, 4), -1, 1), "frames"),
    ("halo_pack", (torch.zeros(1, 2, 3, 4, 4).double(), 0, 1), "float32"),
    ("halo_pack", (torch.zeros(1, 2, 3, 4, 4).transpose(1, 2), 0, 1), "x_BCTHW"),
    ("halo_unpack_add", (torch.zeros(1, 2, 3, 4, 4), torch.zeros(1, 2, 1, 4, 5), 0), "message"),
]


UNLIKE = ("16 bytes", "S and N at least 1")  # C++ reads single values wherever they lie, and none of none


@pytest.mark.parametrize("library", ["simt", "C++"])
def test_a_direct_call_of_an_op_reads_nothing_outside_its_tensors(request, need_compiled, library):
    """In the launchers of the CUDA kernels, which the SIMT shim shares, and in those of the C++ ops."""
    ops = request.getfixturevalue("simt") if library == "simt" else torch.ops.megacogvx
    refused = 0
    for name, arguments, named in DIRECT:
        if library == "C++" and (name not in ("qk_norm_rope", "adaln_modulate") or named in UNLIKE):
            continue  # the others have no C++ version
        if library == "C++" and named == "qkv_SN3K" and arguments[0].stride(-1) == 1:
            continue  # of any address, and in fp64
        with pytest.raises(RuntimeError, match=named):
            getattr(ops, name)(*arguments)
        refused += 1
    assert refused == (len(DIRECT) if library == "simt" else 11)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPS)
def test_cuda_names_every_wrong_argument_alike(name):
    function, good = OPS[name]

    def on_gpu(x):
        if not isinstance(x, torch.Tensor) or x.device.type != "cpu":
            return x
        if x.storage_offset():
            return x.as_strided((x.numel() + 1,), (1,), 0).cuda()[1:].view(x.shape)
        return x.cuda()

    for _, change, error, named in (bad for bad in BAD if bad[0] == name):
        tensors = [x for x in change.values() if isinstance(x, torch.Tensor)]
        if any(not checks.is_aligned(x) and not x.storage_offset() for x in tensors) or "backend" in change:
            continue  # torch's allocator gives no such memory; and GPUs do have these backends
        arguments = {key: on_gpu(x) for key, x in {**good(), **change}.items()}
        expected = _complaint(function, {**good(), **change}, error, named)
        assert _complaint(function, arguments, error, named).replace("cuda:0", "cpu") == expected


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qk_norm_rope", "adaln_modulate", "group_norm"])
def test_a_direct_call_with_tensors_on_two_devices_is_refused(name):
    first, *others = {"qk_norm_rope": _rope_call, "adaln_modulate": _modulate_call, "group_norm": _norm_call}[name]()
    with pytest.raises(RuntimeError, match="one device"):
        getattr(torch.ops.megacogvx, name)(first.cuda(), *others)
