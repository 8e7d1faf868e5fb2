"""What is checked on the card before anything is timed: kernels against references, and beyond 2^31 elements."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from bench_tokens import one_sample
from scale import Scale
from timing import release

from megacogvx.testing.kernel_cases import adaln_arguments, rope_arguments, run_with_gradients, widened
from megacogvx.testing.tolerance import assert_close
from megacogvx_kernels import adaln, compiled, group_norm_moments, qk_norm_rope
from megacogvx_kernels.causal_halo.frames import last_frames

TAIL = 10  # tokens that are computed a second time, by themselves


def against_references(scale: Scale) -> None:
    """Hold the ops to the references in fp64 on random shapes.

    Raises:
        AssertionError: one is off, or there are no kernels.
    """
    assert scale.is_dry or "cuda" in compiled.available(), "the compiled ops have no CUDA kernels"
    for seed in range(scale.checked):
        rope, plain = rope_arguments(seed, widths=(8, 64, 72, 128)), qk_norm_rope.reference.qk_norm_rope
        _check(qk_norm_rope.qk_norm_rope, rope, partial(plain, rotate=True), seed, scale)
        norm = adaln_arguments(seed, dtype=torch.float32, widths=(64, 200, 3072))
        _check(adaln.gated_residual_adaln, norm, adaln.reference.gated_residual_adaln, seed, scale)
        _check(group_norm_moments.group_norm_moments, _clip(seed), _group_norm, seed, scale)


def _check(function: Any, arguments: dict[str, Any], reference: Any, seed: int, scale: Scale) -> None:
    there = {name: x.to(scale.device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    results, gradients = run_with_gradients(function, there, seed)
    expected, expected_gradients = run_with_gradients(reference, widened(arguments), seed)
    bound = 5e-5 if results[0].dtype == torch.float32 else 8e-3
    for i, (actual, wanted) in enumerate(zip(results, expected, strict=True)):
        assert_close(actual.cpu(), wanted, bound, f"result {i} of case {seed}")
    for name, gradient in gradients.items():
        assert_close(gradient.cpu(), expected_gradients[name], bound, f"gradient of {name} of case {seed}")


def _clip(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1 + seed % 2, 16, 1 + seed % 4, 8, 8, generator=generator) + seed % 3
    x = x.to(memory_format=torch.channels_last_3d) if seed % 2 else x
    affine = {name: torch.randn(16, generator=generator) for name in ("weight_C", "bias_C")}
    return {"x_BCTHW": x, **affine, "groups": 4, "eps": 1e-6, "activation": True}


def _group_norm(**arguments: Any) -> torch.Tensor:
    return group_norm_moments.reference.group_norm_moments(**arguments)


def beyond_2_to_the_31(scale: Scale) -> None:
    """Compare the end of tensors with more than 2^31 elements with the same, computed by itself.

    Raises:
        AssertionError: an offset has fewer than 64 bits.
    """
    for check in (_rope_tail, _adaln_tail, _clip_tail):
        check(scale)
        release(scale)


def _rope_tail(scale: Scale) -> None:
    tokens, heads = scale.beyond[0], 48
    qkv = _random(scale, tokens, heads, 3, scale.head_width).requires_grad_()
    vectors = [_random(scale, scale.head_width) for _ in range(4)]
    tables = one_sample(tokens, scale)
    axes = (scale.head_width // 4, *(3 * scale.head_width // 8,) * 2)
    tail = qkv.detach()[-TAIL:].clone().requires_grad_()
    whole = qk_norm_rope.qk_norm_rope(qkv, *vectors, *tables, 0, axes=axes)
    part = qk_norm_rope.qk_norm_rope(tail, *vectors, *tables, tokens - TAIL, axes=axes)
    _compare(whole, part, (qkv,), (tail,))


def _adaln_tail(scale: Scale) -> None:
    tokens, width = scale.beyond[1], 3072
    table, affine = _random(scale, 2, 3, width), [_random(scale, width) for _ in range(2)]
    rows = torch.arange(tokens, device=scale.device) * 2 // tokens
    inputs = [_random(scale, tokens, width).requires_grad_() for _ in range(2)]
    tails = [x.detach()[-TAIL:].clone().requires_grad_() for x in inputs]
    whole = adaln.gated_residual_adaln(*inputs, table, *affine, table, rows, eps=1e-5)
    part = adaln.gated_residual_adaln(*tails, table, *affine, table, rows[-TAIL:].clone(), eps=1e-5)
    _compare(whole, part, inputs, tails)


def _compare(whole: Any, part: Any, inputs: Any, tails: Any) -> None:
    pulls = [torch.randn_like(x) for x in whole]
    gradients = torch.autograd.grad(whole, inputs, pulls)
    of_tails = torch.autograd.grad(part, tails, [pull[-TAIL:].clone() for pull in pulls])
    for a, b in zip((*whole, *gradients), (*part, *of_tails), strict=True):
        assert torch.equal(a[-TAIL:], b), "the end of a large tensor differs"


def _clip_tail(scale: Scale) -> None:
    shape = (1, 8, 3, 4, 4) if scale.is_dry else (1, 8, 66, 2048, 2048)
    x = _random(scale, *shape)
    weight, bias = _random(scale, 8), _random(scale, 8)
    y = group_norm_moments.group_norm_moments(x, weight, bias, 8, 1e-6)
    last = group_norm_moments.group_norm_moments(
        x[:, -1:].contiguous(), weight[-1:].clone(), bias[-1:].clone(), 1, 1e-6
    )
    assert_close(y[:, -1:], last, 8e-3, "the last channel of a large clip")
    assert torch.equal(last_frames(x[:, :, -2:], torch.contiguous_format), x[:, :, -2:]), "packed frames"


def _random(scale: Scale, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=scale.device, dtype=scale.dtype)
