"""Attention of a pack: one dense call a sample with cuDNN or flash-attn, or one call for samples of unequal length."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from scale import Scale
from timing import Found, time_of

KERNELS = ("cuDNN per sample", "flash per sample", "varlen")
PASSES = 3.5  # forward's FLOPs in forward and backward together: backward computes the scores again


def size_of(samples: int, tokens: int) -> str:
    """Return how the table calls a pack."""
    return f"{samples} x {tokens} tokens"


def measure(how: str, samples: int, tokens: int, scale: Scale) -> dict[str, Found]:
    """Time forward and backward together, in milliseconds, and TFLOP/s."""
    shape = (samples * tokens, scale.attention_heads, scale.head_width)
    qkv = [torch.randn(shape, device=scale.device, dtype=scale.dtype) for _ in range(3)]
    attend = _varlen(samples, tokens, scale) if how == "varlen" else _per_sample(how, tokens, scale)
    pull = torch.randn_like(attend(*qkv))

    def both(*x: torch.Tensor) -> None:
        leaves = [each.detach().requires_grad_() for each in x]
        torch.autograd.grad(attend(*leaves), leaves, pull)

    milliseconds = time_of(both, [qkv], scale, repeats=min(5, scale.repeats))
    flops = PASSES * 4 * samples * tokens**2 * scale.attention_heads * scale.head_width
    return {f"attention forward + backward, {how}": {"ms": milliseconds, "tflops": flops / milliseconds / 1e9}}


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _per_sample(how: str, tokens: int, scale: Scale) -> Attend:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    on_gpu = SDPBackend.CUDNN_ATTENTION if how.startswith("cuDNN") else SDPBackend.FLASH_ATTENTION
    backend = SDPBackend.MATH if scale.is_dry else on_gpu

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        parts = zip(*(x.transpose(0, 1)[None].split(tokens, dim=2) for x in (q, k, v)), strict=True)
        with sdpa_kernel([backend]):
            done = [F.scaled_dot_product_attention(*part)[0].transpose(0, 1) for part in parts]
        return done[0] if len(done) == 1 else torch.cat(done)

    return attend


def _varlen(samples: int, tokens: int, scale: Scale) -> Attend:
    if scale.is_dry:
        return _per_sample("flash per sample", tokens, scale)  # torch has it for GPUs only
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.arange(samples + 1, device=scale.device, dtype=torch.int32) * tokens

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = varlen_attn(q, k, v, ends, ends, tokens, tokens)
        return found

    return attend


def fastest(rows: dict[str, Found], scale: Scale) -> list[str]:
    """Return a sentence for each pack on which kernel the transformer should take."""
    said = []
    for samples, tokens in scale.packs:
        size = size_of(samples, tokens)
        times = {how: rows.get(f"attention forward + backward, {how}: {size}", {}).get("ms") for how in KERNELS}
        measured = {how: ms for how, ms in times.items() if ms}
        if len(measured) > 1:
            best, *others = sorted(measured, key=lambda how: measured[how])
            margins = ", ".join(f"{measured[how] / measured[best]:.2f} x the time with {how}" for how in others)
            said.append(f"Attention, {size}: {best} is fastest; {margins}.")
    return said
