"""`qk_norm_rope` as a registered op: `megacogvx::qk_norm_rope` and its gradient, `megacogvx::qk_norm_rope_backward`.

Both are defined and implemented in csrc/ for CPU and CUDA. Here are their shapes for tracing, and the autograd formula
that ties them together; the gradient has none of its own.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from megacogvx_kernels import compiled
from megacogvx_kernels.checks import ALIGNMENT, packed

WIDEST, CHUNK = 128, 8  # channels of a head that the compiled ops take; the kernel's lanes take 8 each


def takes(qkv_SN3K: torch.Tensor, rotate: bool) -> bool:
    """Tell whether the compiled op answers this call; see `compiled.answers`."""
    width = qkv_SN3K.shape[-1]
    of_access = ALIGNMENT // qkv_SN3K.element_size()
    is_torch_enough = not rotate and qkv_SN3K.device.type == "cpu"  # torch's own LayerNorm is one pass there
    fits_kernel = (
        qkv_SN3K.dtype != torch.float64
        and width % CHUNK == 0
        and all(stride % of_access == 0 for stride in qkv_SN3K.stride()[:3])
    )
    if is_torch_enough or width > WIDEST or not compiled.answers("qk_norm_rope", qkv_SN3K, fits_kernel):
        return False
    _register()
    return True


def qk_norm_rope(
    qkv_SN3K: torch.Tensor,
    q_weight_K: torch.Tensor,
    q_bias_K: torch.Tensor,
    k_weight_K: torch.Tensor,
    k_bias_K: torch.Tensor,
    sample_table_M5: torch.Tensor,
    rope_grid_M6: torch.Tensor,
    token_offset: int,
    *,
    eps: float,
    axes: tuple[int, int, int],
    theta: float,
    rotate: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call the registered op; the arguments are the reference's."""
    result: tuple[torch.Tensor, torch.Tensor] = torch.ops.megacogvx.qk_norm_rope(
        qkv_SN3K, packed(q_weight_K), packed(q_bias_K), packed(k_weight_K), packed(k_bias_K),
        packed(sample_table_M5.int()), packed(rope_grid_M6.float()), token_offset, eps,
        *(axes[:2] if rotate else (0, 0)), theta, rotate,
    )  # fmt: skip
    return result


@cache
def _register() -> None:
    torch.library.register_fake("megacogvx::qk_norm_rope")(_shapes)
    torch.library.register_fake("megacogvx::qk_norm_rope_backward")(_gradient_shapes)
    torch.library.register_autograd("megacogvx::qk_norm_rope", _backward, setup_context=_keep)


def _shapes(qkv_SN3K: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, heads, _, width = qkv_SN3K.shape
    return qkv_SN3K.new_empty(tokens, heads, width), qkv_SN3K.new_empty(tokens, heads, width)


def _gradient_shapes(
    grad_q_SNK: torch.Tensor, grad_k_SNK: torch.Tensor, qkv_SN3K: torch.Tensor, q_weight_K: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, ...]:
    return qkv_SN3K.new_empty(qkv_SN3K.shape), *(q_weight_K.new_empty(q_weight_K.shape) for _ in range(4))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.numbers = inputs[7:]


def _backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
    """The statistics are computed again: the inputs are read anyway, and nothing else has to be kept."""
    grad_q, grad_k = (packed(gradient) for gradient in gradients)
    found = torch.ops.megacogvx.qk_norm_rope_backward(grad_q, grad_k, *ctx.saved_tensors, *ctx.numbers)
    return (*found, *(None,) * 8)
