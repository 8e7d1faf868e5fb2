"""The compiled `qk_norm_rope`, C++ and (through the SIMT shim) CUDA, is the reference in fp64, but for rounding."""

import pytest
import torch

from megacogvx import draws
from megacogvx.testing.kernel_cases import EPSILON, rope_arguments, run_with_gradients, widened
from megacogvx.testing.tolerance import assert_close
from megacogvx_kernels import compiled
from megacogvx_kernels.qk_norm_rope import compiled as op
from megacogvx_kernels.qk_norm_rope import qk_norm_rope, reference

KERNEL_WIDTHS = (8, 16, 40, 64, 64, 72, 128)
BOUND = 2e-5  # fp32, positions up to 70: half a unit in the last place of an angle is 4e-6
GRADIENTS = ("qkv_SN3K", "q_weight_K", "q_bias_K", "k_weight_K", "k_bias_K")


def _bound(dtype):
    return BOUND + (EPSILON[dtype] if dtype in (torch.bfloat16, torch.float16) else 0.0)


def _reference(**arguments):
    return reference.qk_norm_rope(**{"rotate": True, **arguments})


def _hold_to_the_reference(results, gradients, arguments, seed):
    expected, expected_gradients = run_with_gradients(_reference, widened(arguments), seed)
    bound = _bound(arguments["qkv_SN3K"].dtype)
    for name, actual, reference_SNK in zip("qk", results, expected, strict=True):
        assert_close(actual, reference_SNK, bound, f"{name} of case {seed}")
    assert set(gradients) == set(GRADIENTS)
    for name in GRADIENTS:
        assert_close(gradients[name], expected_gradients[name], bound, f"gradient of {name} of case {seed}")


def _in_kernel(ops):
    """A stand-in for the public function that calls the op of another library, with its gradient."""

    class Call(torch.autograd.Function):
        @staticmethod
        def forward(ctx, numbers, *tensors):
            ctx.save_for_backward(*tensors)
            ctx.numbers = numbers
            return ops.qk_norm_rope(*tensors, *numbers)

        @staticmethod
        def backward(ctx, *gradients):
            found = ops.qk_norm_rope_backward(*(g.contiguous() for g in gradients), *ctx.saved_tensors, *ctx.numbers)
            return None, *found, None, None

    def call(qkv_SN3K, sample_table_M5, rope_grid_M6, token_offset, *, axes, theta, eps, rotate=True, **parameters):
        tensors = (qkv_SN3K, *parameters.values(), sample_table_M5.int(), rope_grid_M6)
        return Call.apply((token_offset, eps, *axes[:2], theta, rotate), *tensors)

    return call


@pytest.mark.parametrize("part", range(4))
def test_cpp_equals_the_reference_on_random_shapes(need_compiled, shapes, part):
    for seed in shapes(part, 4):
        arguments = rope_arguments(seed, dtype=torch.float64 if seed % 5 == 0 else None)
        assert op.takes(arguments["qkv_SN3K"], rotate=True)
        _hold_to_the_reference(*run_with_gradients(qk_norm_rope, arguments, seed), arguments, seed)


@pytest.mark.parametrize("part", range(4))
def test_the_kernels_equal_the_reference_on_random_shapes(simt, shapes, part):
    for seed in shapes(part, 4):
        arguments = rope_arguments(10_000 + seed, widths=KERNEL_WIDTHS)
        _hold_to_the_reference(*run_with_gradients(_in_kernel(simt), arguments, seed), arguments, seed)


def test_the_kernels_need_no_particular_order_of_threads(simt):
    arguments = rope_arguments(1, dtype=torch.float32, widths=(64,))
    runs = [run_with_gradients(_in_kernel(simt), arguments, 1) for _ in range(3)]  # each in a new random order
    for results, gradients in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results, runs[0][0], strict=True))
        assert all(torch.equal(gradients[name], runs[0][1][name]) for name in GRADIENTS)


def test_a_kernel_covers_several_blocks_and_a_partial_one(simt):
    arguments = {
        **rope_arguments(3, dtype=torch.bfloat16, widths=(64,)),
        "sample_table_M5": torch.tensor([[0, 7, 3, 5, 6], [97, 11, 1, 1, 1]]),
        "rope_grid_M6": torch.tensor([[0.0, 0, 0, 1, 1, 1], [900, 900, 1000, 1, 1, 1]]),
        "token_offset": 3,
        "qkv_SN3K": draws.normal((70, 3, 3, 64), 3, "many").bfloat16(),
    }
    _hold_to_the_reference(*run_with_gradients(_in_kernel(simt), arguments, 3), arguments, 3)


def test_gradcheck(need_compiled):
    arguments = rope_arguments(4, dtype=torch.float64, widths=(8,))
    arguments["qkv_SN3K"] = arguments["qkv_SN3K"][:6].contiguous()
    rest = {name: value for name, value in arguments.items() if name not in GRADIENTS}
    leaves = [arguments[name].clone().requires_grad_() for name in GRADIENTS]
    assert torch.autograd.gradcheck(lambda *x: qk_norm_rope(**dict(zip(GRADIENTS, x, strict=True)), **rest), leaves)


@pytest.mark.parametrize("seed", [0, 7])
def test_opcheck(need_compiled, seed):
    arguments = rope_arguments(seed, dtype=torch.float32)
    assert op.takes(arguments["qkv_SN3K"], rotate=True)  # registers
    tensors = [arguments[name].clone() for name in GRADIENTS]
    tensors += [arguments["sample_table_M5"].int(), arguments["rope_grid_M6"]]
    numbers = (arguments["token_offset"], 1e-6, *arguments["axes"][:2], 1e4, True)
    forward = (*(x.requires_grad_(x.is_floating_point() and i < 5) for i, x in enumerate(tensors)), *numbers)
    torch.library.opcheck(torch.ops.megacogvx.qk_norm_rope.default, forward)
    tokens, heads, _, width = tensors[0].shape
    pulls = [torch.ones(tokens, heads, width)] * 2
    backward = (*pulls, *(x.detach() for x in tensors), *numbers)
    torch.library.opcheck(torch.ops.megacogvx.qk_norm_rope_backward.default, backward)


def test_the_gradients_are_the_same_bits_on_any_number_of_threads(need_compiled):
    arguments = rope_arguments(5, dtype=torch.bfloat16, widths=(64,))
    arguments["sample_table_M5"] = torch.tensor([[0, 9, 10, 10, 10]])
    arguments["rope_grid_M6"] = torch.tensor([[0.0, 0, 0, 1, 1, 1]])
    arguments.update(token_offset=0, qkv_SN3K=draws.normal((1009, 2, 3, 64), 5, "threads").bfloat16())
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(run_with_gradients(qk_norm_rope, arguments, 5)[1])
    finally:
        torch.set_num_threads(before)
    for gradients in runs[1:]:
        assert all(torch.equal(gradients[name], runs[0][name]) for name in GRADIENTS)


def test_text_is_bit_equal_to_the_norm_alone(simt):
    """Text and padding in a kernel: normed, not rotated."""
    arguments = rope_arguments(6, dtype=torch.float32, widths=(64,))
    arguments["sample_table_M5"] = torch.tensor([[0, 40, 1, 1, 1]])
    arguments["rope_grid_M6"] = torch.tensor([[9.0, 8, 7, 1, 1, 1]])
    arguments.update(token_offset=0, qkv_SN3K=draws.normal((41, 2, 3, 64), 6, "text"))
    rotated, plain = (_in_kernel(simt)(**arguments, rotate=rotate) for rotate in (True, False))
    for with_rotation, without in zip(rotated, plain, strict=True):
        assert torch.equal(with_rotation[:40], without[:40])
        assert not torch.equal(with_rotation[40], without[40])


def test_a_table_is_read_once_and_again_after_a_change(need_compiled):
    arguments = rope_arguments(8, dtype=torch.float32, widths=(8,))
    qk_norm_rope(**arguments)
    arguments["sample_table_M5"][0, 1] += 1
    with pytest.raises(ValueError, match="sample_table_M5 doesn't add up"):
        qk_norm_rope(**arguments)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_tensors_without_a_version_are_taken(need_compiled, context):
    with context():
        arguments = rope_arguments(8, dtype=torch.float32, widths=(8,))
        q, k = qk_norm_rope(**arguments)
    expected = qk_norm_rope(**rope_arguments(8, dtype=torch.float32, widths=(8,)))
    assert torch.equal(q, expected[0])
    assert torch.equal(k, expected[1])


def test_the_choice_is_logged_once(need_compiled, caplog):
    compiled._name_once.cache_clear()
    arguments = rope_arguments(9, dtype=torch.float32)
    with caplog.at_level("INFO", logger="megacogvx.kernels"):
        compiled._log.addHandler(caplog.handler)
        try:
            for _ in range(3):
                qk_norm_rope(**arguments)
            with compiled.references_only():
                qk_norm_rope(**arguments)
        finally:
            compiled._log.removeHandler(caplog.handler)
    said = {record.getMessage() for record in caplog.records}
    assert said == {"qk_norm_rope on cpu: C++", "qk_norm_rope on cpu: reference"}


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(0, 200))
def test_cuda_equals_the_reference(seed):
    arguments = rope_arguments(seed, widths=KERNEL_WIDTHS)
    on_gpu = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    results, gradients = run_with_gradients(lambda **x: qk_norm_rope(**x), on_gpu, seed)
    _hold_to_the_reference([x.cpu() for x in results], {k: v.cpu() for k, v in gradients.items()}, arguments, seed)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    tokens, heads, width = 240_000, 48, 64  # 2.2e9 elements of qkv
    table = torch.tensor([[0, 0, 24, 100, 100]], device="cuda")
    qkv = torch.randn(tokens, heads * 3 * width, device="cuda", dtype=torch.bfloat16)
    vectors = [torch.ones(width, device="cuda"), torch.zeros(width, device="cuda")] * 2
    grid = torch.tensor([[0.0, 0, 0, 1, 1, 1]], device="cuda")
    q, k = qk_norm_rope(qkv, *vectors, table, grid, 0)
    tail = qk_norm_rope(qkv[-100:].clone(), *vectors, table, grid, tokens - 100)
    assert torch.equal(q[-100:], tail[0])
    assert torch.equal(k[-100:], tail[1])
