"""The compiled ops of `adaln`, C++ and (through the SIMT shim) CUDA, are the references in fp64, but for rounding."""

import pytest
import torch

from megacogvx import draws
from megacogvx.testing.kernel_cases import EPSILON, adaln_arguments, run_with_gradients, widened
from megacogvx.testing.tolerance import assert_close
from megacogvx_kernels.adaln import adaln_modulate, gated_residual, gated_residual_adaln, reference
from megacogvx_kernels.adaln import compiled as op
from megacogvx_kernels.adaln.runs import runs_of

KERNEL_WIDTHS = (8, 64, 64, 200, 1040)
BOUND = 1e-5
OPS = {
    "adaln_modulate": (("residual_SD", "weight_D", "bias_D", "modulation_R3D"), adaln_modulate),
    "gated_residual": (("residual_SD", "branch_SD", "gate_modulation_R3D"), gated_residual),
    "gated_residual_adaln": (
        ("residual_SD", "branch_SD", "gate_modulation_R3D", "weight_D", "bias_D", "modulation_R3D"),
        gated_residual_adaln,
    ),
}
WITH_EPS = ("adaln_modulate", "gated_residual_adaln")


def _bound(dtype):
    return BOUND + (EPSILON[dtype] if dtype in (torch.bfloat16, torch.float16) else 0.0)


def _positional(name, function):
    """Return `function` called with this op's share of all arguments, in their order."""

    def call(rows_S, eps, **tensors):
        used = [tensors[each] for each in OPS[name][0]]
        return function(*used, rows_S, **({"eps": eps} if name in WITH_EPS else {}))

    return call


def _hold_to_the_reference(name, results, gradients, arguments, seed):
    wide = widened(arguments)
    dtype = arguments["residual_SD"].dtype
    if name == "gated_residual_adaln" and dtype != torch.float64:  # the norm sees the residual as it was stored
        stored = {**wide, "residual_SD": results[0].double()}
        modulated = _positional("adaln_modulate", reference.adaln_modulate)(**stored)
        assert_close(results[1], modulated, _bound(dtype), f"modulated tokens of case {seed}")
    expected, expected_gradients = run_with_gradients(_positional(name, getattr(reference, name)), wide, seed)
    loose = 1 if name != "gated_residual_adaln" else 4  # the residual's rounding moves the norm and its gradients
    assert_close(results[0], expected[0], _bound(dtype), f"{name} of case {seed}")
    assert set(gradients) == set(expected_gradients)
    for each, gradient in gradients.items():
        assert_close(gradient, expected_gradients[each], loose * _bound(dtype), f"gradient of {each} of case {seed}")


def _in_kernel(ops, name):
    """A stand-in for the public function that calls the ops of another library, with their gradients."""
    forward, backward = getattr(ops, name), getattr(ops, f"{name}_backward")

    class Call(torch.autograd.Function):
        @staticmethod
        def forward(ctx, eps, *tensors):
            out = forward(*tensors, *eps)
            first = out[0] if isinstance(out, tuple) else tensors[0]
            ctx.save_for_backward(*((first, *tensors[1:]) if name != "gated_residual" else tensors[1:]))
            ctx.eps = eps
            return out

        @staticmethod
        def backward(ctx, *gradients):
            found = backward(*(g.contiguous() for g in gradients), *ctx.saved_tensors, *ctx.eps)
            return None, *(gradients if name == "gated_residual" else ()), *found, None, None, None

    def call(*arguments, eps=None):
        *tensors, rows_S = arguments
        eps = () if eps is None else (eps,)
        return Call.apply(eps, *tensors, rows_S.long(), *runs_of(rows_S, tensors[-1].shape[0]))

    return call


@pytest.mark.parametrize("name", OPS)
def test_cpp_equals_the_reference_on_random_shapes(need_compiled, shapes, name):
    for seed in shapes():
        arguments = adaln_arguments(seed, dtype=torch.float64 if seed % 5 == 0 else None)
        used = [arguments[each] for each in OPS[name][0]]
        assert op.takes(name, tuple(x for x in used if x.dim() == 2), tuple(x for x in used if x.dim() != 2))
        results, gradients = run_with_gradients(_positional(name, OPS[name][1]), arguments, seed)
        _hold_to_the_reference(name, results, gradients, arguments, seed)


@pytest.mark.parametrize("name", OPS)
def test_the_kernels_equal_the_reference_on_random_shapes(simt, shapes, name):
    for seed in shapes(list(OPS).index(name), len(OPS)):
        arguments = adaln_arguments(20_000 + seed, widths=KERNEL_WIDTHS)
        results, gradients = run_with_gradients(_positional(name, _in_kernel(simt, name)), arguments, seed)
        _hold_to_the_reference(name, results, gradients, arguments, seed)


def test_the_kernels_need_no_particular_order_of_threads(simt):
    arguments = adaln_arguments(2, dtype=torch.float32, widths=(1040,))
    call = _positional("gated_residual_adaln", _in_kernel(simt, "gated_residual_adaln"))
    runs = [run_with_gradients(call, arguments, 2) for _ in range(3)]  # each in a new random order
    for results, gradients in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results, runs[0][0], strict=True))
        assert all(torch.equal(gradients[each], runs[0][1][each]) for each in gradients)


@pytest.mark.parametrize("name", OPS)
def test_gradcheck(need_compiled, name):
    arguments = adaln_arguments(7, dtype=torch.float64, widths=(6,))
    rows = arguments["rows_S"][:5].contiguous()
    leaves = [arguments[each][: 5 if each.endswith("SD") else None].clone().requires_grad_() for each in OPS[name][0]]
    more = {"eps": 1e-5} if name in WITH_EPS else {}
    assert torch.autograd.gradcheck(lambda *x: OPS[name][1](*x, rows, **more), leaves)


@pytest.mark.parametrize("name", OPS)
def test_opcheck(need_compiled, name):
    arguments = adaln_arguments(3, dtype=torch.float32)
    rows = arguments["rows_S"].long()
    leaves = [arguments[each].requires_grad_() for each in OPS[name][0]]
    assert op.takes(name, (leaves[0],), ())  # registers
    rest = (rows, *runs_of(rows, arguments["modulation_R3D"].shape[0]), *((1e-5,) if name in WITH_EPS else ()))
    torch.library.opcheck(getattr(torch.ops.megacogvx, name).default, (*leaves, *rest))
    pulls = [torch.ones_like(leaves[0]).detach()] * (2 if name == "gated_residual_adaln" else 1)
    inputs = [x.detach() for x in leaves][1 if name == "gated_residual" else 0 :]
    torch.library.opcheck(getattr(torch.ops.megacogvx, f"{name}_backward").default, (*pulls, *inputs, *rest))


def test_the_gradients_are_the_same_bits_on_any_number_of_threads(need_compiled):
    tokens, width = 600, 192
    arguments = adaln_arguments(5, dtype=torch.bfloat16, widths=(width,))
    rows = torch.arange(tokens) * len(arguments["gate_modulation_R3D"]) // tokens
    arguments.update(rows_S=rows, residual_SD=draws.normal((tokens, width), 5, "r").bfloat16())
    arguments["branch_SD"] = draws.normal((tokens, width), 5, "b").bfloat16()
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            call = _positional("gated_residual_adaln", gated_residual_adaln)
            runs.append(run_with_gradients(call, arguments, 5)[1])
    finally:
        torch.set_num_threads(before)
    for gradients in runs[1:]:
        assert all(torch.equal(gradients[each], runs[0][each]) for each in gradients)


def test_runs_cover_every_token_once_and_are_sorted_by_row():
    rows = torch.tensor([3] * 70 + [0] * 33 + [3] * 2 + [1])
    runs_G3, run_starts = runs_of(rows, 5)
    assert runs_G3.tolist() == [
        [70, 102, 0], [102, 103, 0], [105, 106, 1], [0, 32, 3], [32, 64, 3], [64, 70, 3], [103, 105, 3],
    ]  # fmt: skip
    assert run_starts.tolist() == [0, 2, 3, 3, 7, 7]


@pytest.mark.parametrize("name", OPS)
def test_results_are_no_views_in_either_shape(need_compiled, name):
    """megatron-core's pipeline schedules free a stage's output once it is sent, and refuse to free a view."""
    arguments = adaln_arguments(4, dtype=torch.float32, widths=(64,))
    flat = _positional(name, OPS[name][1])(**arguments)
    middle = {key: x[:, None] if key.endswith("_SD") else x for key, x in arguments.items()}
    shaped = _positional(name, OPS[name][1])(**middle)
    for a, b in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (flat, shaped)), strict=True):
        assert b.shape == (a.shape[0], 1, a.shape[1])
        assert torch.equal(a, b[:, 0])
        assert a._base is None
        assert b._base is None


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPS)
def test_cuda_equals_the_reference(name):
    for seed in range(200):
        arguments = adaln_arguments(seed, widths=(*KERNEL_WIDTHS, 3072, 4096))
        on_gpu = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}
        results, gradients = run_with_gradients(_positional(name, OPS[name][1]), on_gpu, seed)
        on_cpu = {key: value.cpu() for key, value in gradients.items()}
        _hold_to_the_reference(name, [x.cpu() for x in results], on_cpu, arguments, seed)
