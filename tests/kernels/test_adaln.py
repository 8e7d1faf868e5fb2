from contextlib import nullcontext

import pytest
import torch

from megacogvx import draws
from megacogvx.testing.tolerance import assert_close
from megacogvx_kernels.adaln import adaln_modulate, gated_residual, gated_residual_adaln
from megacogvx_kernels.compiled import references_only

WIDTH, EPS = 12, 1e-5
ROWS = torch.tensor([1, 1, 0, 0, 0, 3, 2, 2, 5])  # row 4 is used by no token
TOKENS = len(ROWS)


def _draw(name, *shape, dtype=torch.float32):
    return draws.normal(shape, 0, name).to(dtype).requires_grad_()


def _arguments(dtype=torch.float32):
    return {
        "residual": _draw("residual", TOKENS, WIDTH, dtype=dtype),
        "branch": _draw("branch", TOKENS, WIDTH, dtype=dtype),
        "gates": _draw("gates", 6, 3, WIDTH, dtype=dtype),
        "weight": _draw("weight", WIDTH, dtype=dtype),
        "bias": _draw("bias", WIDTH, dtype=dtype),
        "table": _draw("table", 6, 3, WIDTH, dtype=dtype),
    }


def _definition(residual, branch, gates, weight, bias, table):
    """Token by token, in fp64."""
    residuals, modulated = [], []
    for token, row in enumerate(ROWS.tolist()):
        x = residual[token].double() + gates[row, 2].double() * branch[token].double()
        normed = (x - x.mean()) / torch.sqrt(x.var(unbiased=False) + EPS) * weight.double() + bias.double()
        residuals.append(x)
        modulated.append(normed * (1 + table[row, 1].double()) + table[row, 0].double())
    return torch.stack(residuals), torch.stack(modulated)


def _run(residual, branch, gates, weight, bias, table):
    return gated_residual_adaln(residual, branch, gates, weight, bias, table, ROWS, eps=EPS)


def test_equals_the_definition_with_gradients():
    results = []
    for function in (_run, _definition):
        arguments = _arguments()
        residual, modulated = function(**arguments)
        (residual * draws.normal((TOKENS, WIDTH), 1, "r")).sum().backward(retain_graph=True)
        (modulated * draws.normal((TOKENS, WIDTH), 1, "m")).sum().backward()
        results.append((residual, modulated, {name: leaf.grad for name, leaf in arguments.items()}))
    (residual, modulated, gradients), (expected_residual, expected_modulated, expected) = results
    assert_close(residual, expected_residual, 1e-6, "residual")
    assert_close(modulated, expected_modulated, 1e-6, "modulated")
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name], 1e-5, name)


def test_the_two_halves_compose_to_the_whole():
    arguments = _arguments()
    residual, modulated = _run(**arguments)
    first = gated_residual(arguments["residual"], arguments["branch"], arguments["gates"], ROWS)
    second = adaln_modulate(first, arguments["weight"], arguments["bias"], arguments["table"], ROWS, eps=EPS)
    assert torch.equal(residual, first)
    assert torch.equal(modulated, second)


def test_a_middle_axis_of_one_is_kept():
    arguments = _arguments()
    x, rest = arguments["residual"], (arguments["weight"], arguments["bias"], arguments["table"], ROWS)
    flat, middle = adaln_modulate(x, *rest, eps=EPS), adaln_modulate(x[:, None], *rest, eps=EPS)
    assert middle.shape == (TOKENS, 1, WIDTH)
    assert torch.equal(middle[:, 0], flat)


@pytest.fixture(params=[nullcontext, references_only], ids=["what is there", "reference"])
def implementation(request):
    with request.param():
        yield


def test_bf16_is_fp32_rounded_once(implementation):
    narrow = _arguments(torch.bfloat16)
    wide = {name: leaf.detach().float() for name, leaf in narrow.items()}
    residual, _ = _run(**narrow)
    assert torch.equal(residual, _run(**wide)[0].bfloat16())
    x, rest = "residual", ("weight", "bias", "table")
    modulated = adaln_modulate(narrow[x], *(narrow[name] for name in rest), ROWS, eps=EPS)
    assert torch.equal(modulated, adaln_modulate(wide[x], *(wide[name] for name in rest), ROWS, eps=EPS).bfloat16())


def test_gradients_of_a_bf16_table_are_summed_in_fp32(implementation):
    tokens = 4096  # a running sum in bf16 would stop at 256
    table = torch.zeros(1, 3, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    ones = torch.ones(tokens, WIDTH, dtype=torch.bfloat16)
    gated_residual(ones, ones, table, torch.zeros(tokens, dtype=torch.int64)).sum().backward()
    assert torch.equal(table.grad[0, 2], torch.full((WIDTH,), float(tokens), dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"residual": torch.zeros(TOKENS + 1, WIDTH)}, "rows_S"),
        ({"residual": torch.zeros(TOKENS, WIDTH, dtype=torch.int64)}, "residual_SD"),
        ({"branch": torch.zeros(TOKENS, WIDTH + 1)}, "branch_SD"),
        ({"gates": torch.zeros(6, 2, WIDTH)}, "gate_modulation_R3D"),
        ({"weight": torch.zeros(WIDTH + 1)}, "weight_D"),
        ({"table": torch.zeros(6, 3, WIDTH + 1)}, "modulation_R3D"),
    ],
)
def test_a_wrong_argument_is_named(change, named):
    with pytest.raises((ValueError, TypeError), match=named):
        _run(**{**_arguments(), **change})
