import cmath
import math

import pytest
import torch

from megacogvx import draws
from megacogvx.pack_layout import PackSample, build_layout
from megacogvx.testing.tolerance import assert_close
from megacogvx_kernels.qk_norm_rope import qk_norm_rope, take_v

HEADS, WIDTH, AXES, THETA, EPS = 3, 16, (4, 6, 6), 10000.0, 1e-6
SAMPLES = [
    PackSample(7, text_length=3, grid=(2, 2, 3), origin=(0.0, 1.5, -2.0), step=(1.0, 0.5, 0.25)),
    PackSample(8, text_length=0, grid=(1, 3, 2), origin=(3.0, 0.5, 1.0)),
    PackSample(9, text_length=4, grid=(0, 0, 0)),
    PackSample(10, text_length=1, grid=(3, 1, 1)),
]
LAYOUT = build_layout(SAMPLES, (1, 2, 2), multiple=40)


def _arguments(dtype=torch.float32):
    names = ("q_weight_K", "q_bias_K", "k_weight_K", "k_bias_K")
    qkv = draws.normal((LAYOUT.num_tokens, HEADS, 3, WIDTH), 0, "qkv").to(dtype)
    return {
        "qkv_SN3K": qkv,
        **{name: draws.normal((WIDTH,), 0, name).to(dtype) for name in names},
        "sample_table_M5": LAYOUT.sample_table(),
        "rope_grid_M6": LAYOUT.rope_grid(),
        "token_offset": 0,
        "axes": AXES,
        "theta": THETA,
        "eps": EPS,
    }


def _one_token(vector, weight, bias, position):
    """The definition, in Python numbers: LayerNorm, then each pair of channels times exp(i angle)."""
    values = vector.double().tolist()
    mean = sum(values) / WIDTH
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / WIDTH + EPS)
    normed = [
        (value - mean) / deviation * w + b
        for value, w, b in zip(values, weight.double().tolist(), bias.double().tolist(), strict=True)
    ]
    if position is None:
        return normed
    rotated, channel = [], 0
    for axis, size in enumerate(AXES):
        for pair in range(size // 2):
            angle = position[axis] * THETA ** (-2 * pair / size)
            number = complex(normed[channel], normed[channel + 1]) * cmath.exp(1j * angle)
            rotated += [number.real, number.imag]
            channel += 2
    return rotated


def _positions():
    """Position of every token of the pack, by walking through it; None for text and padding."""
    walked = []
    for sample in LAYOUT.samples:
        walked += [None] * sample.text_length
        t, h, w = sample.grid
        for cell in ((i, j, k) for i in range(t) for j in range(h) for k in range(w)):
            walked.append([o + s * c for o, s, c in zip(sample.origin, sample.step, cell, strict=True)])
    return walked


def test_equals_the_definition_token_by_token():
    arguments = _arguments()
    q, k = qk_norm_rope(**arguments)
    for place, name, actual in ((0, "q", q), (1, "k", k)):
        weight, bias = arguments[f"{name}_weight_K"], arguments[f"{name}_bias_K"]
        expected = torch.tensor(
            [
                [_one_token(head[place], weight, bias, position) for head in token]
                for token, position in zip(arguments["qkv_SN3K"], _positions(), strict=True)
            ],
            dtype=torch.float64,
        )
        assert_close(actual, expected, 1e-6, name)


def test_a_shard_is_bit_equal_to_its_part_of_the_whole():
    arguments = _arguments()
    whole = qk_norm_rope(**arguments)
    for start, stop in ((0, 5), (5, 21), (21, LAYOUT.num_tokens)):
        part = {**arguments, "qkv_SN3K": arguments["qkv_SN3K"][start:stop], "token_offset": start}
        for shard, full in zip(qk_norm_rope(**part), whole, strict=True):
            assert torch.equal(shard, full[start:stop])


def test_without_rotation_only_the_norm_is_left():
    arguments = _arguments()
    q, _ = qk_norm_rope(**arguments, rotate=False)
    expected = torch.nn.functional.layer_norm(
        arguments["qkv_SN3K"][:, :, 0], (WIDTH,), arguments["q_weight_K"], arguments["q_bias_K"], EPS
    )
    assert torch.equal(q, expected)


def test_bf16_is_fp32_rounded_once():
    arguments = _arguments(torch.bfloat16)
    rounded = [name for name, value in arguments.items() if getattr(value, "dtype", None) == torch.bfloat16]
    wide = {**arguments, **{name: arguments[name].float() for name in rounded}}
    for narrow, reference in zip(qk_norm_rope(**arguments), qk_norm_rope(**wide), strict=True):
        assert narrow.dtype == torch.bfloat16
        assert torch.equal(narrow, reference.bfloat16())


def test_gradients_match_finite_differences():
    arguments = _arguments()
    leaves = {name: arguments[name].requires_grad_() for name in ("qkv_SN3K", "q_weight_K", "k_bias_K")}
    cotangents = [draws.normal((LAYOUT.num_tokens, HEADS, WIDTH), 1, "cotangent", i) for i in range(2)]

    def loss():
        return sum((x.double() * c).sum() for x, c in zip(qk_norm_rope(**arguments), cotangents, strict=True))

    gradients = torch.autograd.grad(loss(), list(leaves.values()))
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        direction, h = draws.normal(tuple(leaf.shape), 2, name), 1e-2
        with torch.no_grad():
            ends = []
            for sign in (1, -1):
                leaf += sign * h * direction
                ends.append(loss())
                leaf -= sign * h * direction
        slope = (ends[0] - ends[1]) / (2 * h)
        assert slope.item() == pytest.approx((gradient.double() * direction).sum().item(), rel=2e-3), name


@pytest.mark.parametrize("layout", ["flat", "middle"])
def test_accepts_qkv_as_the_linear_layer_returns_it(layout):
    arguments = _arguments()
    expected = qk_norm_rope(**arguments)
    qkv = arguments["qkv_SN3K"].flatten(1)
    arguments["qkv_SN3K"] = qkv if layout == "flat" else qkv[:, None]
    for actual, reference in zip(qk_norm_rope(**arguments), expected, strict=True):
        assert torch.equal(actual, reference)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"k_bias_K": torch.zeros(WIDTH + 1)}, "k_bias_K"),
        ({"qkv_SN3K": torch.zeros(5, HEADS * 3 * WIDTH + 1)}, "qkv_SN3K"),
        ({"sample_table_M5": torch.zeros(2, 5)}, "sample_table_M5"),
        ({"rope_grid_M6": torch.zeros(2, 6)}, "rope_grid_M6"),
        ({"axes": (4, 6, 8)}, "axes"),
        ({"axes": (5, 5, 6)}, "axes"),
        ({"token_offset": -1}, "token_offset"),
    ],
)
def test_a_wrong_argument_is_named(change, named):
    with pytest.raises((ValueError, TypeError), match=named):
        qk_norm_rope(**{**_arguments(), **change})


def test_taking_v_out_has_the_gradient_of_a_slice():
    gradients = []
    for take in (take_v, lambda qkv: (qkv, qkv[:, :, 2])):
        arguments = _arguments()
        leaf = arguments["qkv_SN3K"].requires_grad_()
        arguments["qkv_SN3K"], v = take(leaf)
        q, k = qk_norm_rope(**arguments)
        loss = sum((x * draws.normal(tuple(x.shape), 1, name)).sum() for name, x in (("q", q), ("k", k), ("v", v)))
        loss.backward()
        assert v.data_ptr() == leaf[:, :, 2].data_ptr()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
