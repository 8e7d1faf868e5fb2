"""The CUDA kernels of `group_norm_moments`, run by the SIMT shim, are the reference, but for rounding."""

import itertools
import random

import pytest
import torch

from megacogvx import draws
from megacogvx.testing.kernel_cases import EPSILON, FLOATS, run_with_gradients, widened
from megacogvx.testing.tolerance import assert_close
from megacogvx_kernels.group_norm_moments import compiled, group_norm_moments, reference


def _case(seed):
    chosen = random.Random(seed)
    is_last, dtype = chosen.random() < 0.5, chosen.choice(FLOATS)
    channels = chosen.choice((8, 16, 64) if is_last else (4, 6, 12))
    place = (chosen.randint(1, 3), chosen.randint(1, 5), chosen.choice((8, 16)))
    x = draws.normal((chosen.randint(1, 2), channels, *place), seed, "x") * 2 + chosen.choice((0, 30))
    if is_last:
        x = x.to(memory_format=torch.channels_last_3d)
    arguments = {
        "x_BCTHW": x.to(dtype),
        "weight_C": draws.normal((channels,), seed, "w"), "bias_C": draws.normal((channels,), seed, "b"),
        "groups": chosen.choice([g for g in (1, 2, 3, 4) if channels % g == 0]),
        "eps": 1e-6, "activation": chosen.random() < 0.5,
    }  # fmt: skip
    return arguments, is_last


def _reference(**arguments):
    return reference.group_norm_moments(**arguments)


def _hold_to_the_reference(results, gradients, arguments, seed):
    expected, expected_gradients = run_with_gradients(_reference, widened(arguments), seed)
    dtype = arguments["x_BCTHW"].dtype
    bound = 2e-5 + (EPSILON[dtype] if dtype != torch.float32 else 0.0)
    assert_close(results[0], expected[0], bound, f"case {seed}")
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name], bound, f"gradient of {name} of case {seed}")


def test_the_kernels_equal_the_reference_on_random_shapes(simt, shapes):
    layouts = set()
    for seed in shapes(0, 4):
        arguments, is_last = _case(seed)
        layouts.add(is_last)
        call = lambda **a: compiled.group_norm_moments(**a, group=None, op=simt.group_norm)  # noqa: E731
        results, gradients = run_with_gradients(call, arguments, seed)
        assert results[0].stride() == arguments["x_BCTHW"].stride()
        _hold_to_the_reference(results, gradients, arguments, seed)
    assert layouts == {True, False}


@pytest.mark.parametrize("is_last", [False, True])
def test_several_blocks_of_a_channel(simt, is_last):
    x = draws.normal((1, 8, 3, 80, 80), 1, "x") + 100
    x = x.to(memory_format=torch.channels_last_3d) if is_last else x
    arguments = {"x_BCTHW": x, "weight_C": torch.ones(8), "bias_C": torch.zeros(8), "groups": 2, "eps": 1e-6}
    arguments["activation"] = True
    call = lambda **a: compiled.group_norm_moments(**a, group=None, op=simt.group_norm)  # noqa: E731
    _hold_to_the_reference(*run_with_gradients(call, arguments, 1), arguments, 1)


@pytest.mark.parametrize("is_last", [False, True])
def test_the_kernels_need_no_particular_order_of_threads(simt, is_last):
    arguments = next(arguments for arguments, last in map(_case, range(20)) if last == is_last)
    call = lambda **a: compiled.group_norm_moments(**a, group=None, op=simt.group_norm)  # noqa: E731
    runs = [run_with_gradients(call, arguments, 3) for _ in range(3)]
    for results, gradients in runs[1:]:
        assert torch.equal(results[0], runs[0][0][0])
        assert all(torch.equal(gradients[name], runs[0][1][name]) for name in gradients)


LAID_OUT = {
    "16 bytes missed": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "frames of a longer clip": lambda x: torch.cat([x[:, :, :1], x], dim=2)[:, :, 1:],
    "axes swapped": lambda x: x.transpose(3, 4).contiguous().transpose(3, 4),
}


@pytest.mark.parametrize("place", LAID_OUT)
def test_a_clip_may_lie_anywhere(simt, place):
    """Convolutions lay it out: where the kernels can't read it as it is, they get a copy."""
    arguments = {"x_BCTHW": draws.normal((1, 8, 3, 4, 8), 1, "x"), "weight_C": torch.ones(8), "bias_C": torch.zeros(8)}
    arguments |= {"groups": 2, "eps": 1e-6, "activation": True}

    def call(x_BCTHW, **rest):
        return compiled.group_norm_moments(LAID_OUT[place](x_BCTHW), **rest, group=None, op=simt.group_norm)

    _hold_to_the_reference(*run_with_gradients(call, arguments, 1), arguments, 1)


@pytest.mark.parametrize("is_last", [False, True])
def test_opcheck(simt, is_last):
    """Of every kind of call; 20000 positions are two chunks contiguous and 40 channels-last."""
    shape = (1, 20_000, 8) if is_last else (1, 8, 20_000)
    x, gradient = (draws.normal(shape, 0, name) for name in ("x", "gradient"))
    coefficients = draws.normal((1, 8, 6), 0, "k")
    for kind in (compiled.MOMENTS, compiled.GRADIENT_SUMS, compiled.APPLY, compiled.APPLY_GRADIENT):
        torch.library.opcheck(simt.group_norm.default, (x, gradient, coefficients, kind, is_last, True))


@pytest.mark.gpu
def test_cuda_equals_the_reference():
    for seed, activation in itertools.product(range(60), (False, True)):
        arguments = {**_case(seed)[0], "activation": activation}
        on_gpu = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
        results, gradients = run_with_gradients(lambda **a: group_norm_moments(**a), on_gpu, seed)
        on_cpu = {name: x.cpu() for name, x in gradients.items()}
        _hold_to_the_reference([results[0].cpu()], on_cpu, arguments, seed)
