"""Other people's kernels for a part of what ours do, each timed if it is installed; none is needed.

Liger-Kernel 0.8.5 (Triton), flash-attn 2.8.3, apex and Transformer Engine 2.20. None does all of an op, so its time is
a bound on what a combination of it with torch could reach: what it leaves out is said.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from scale import Scale
from timing import Call, Found, both_ways

PEERS = {  # name -> what it computes
    "Liger-Kernel LayerNorm": "the norm of adaln_modulate, without modulation",
    "Transformer Engine LayerNorm": "the norm of adaln_modulate, without modulation",
    "apex FusedLayerNorm": "the norm of adaln_modulate, without modulation",
    "flash-attn rotary": "the rotation of qk_norm_rope (q and k), without norm",
    "Transformer Engine rotary": "the rotation of qk_norm_rope (q and k), without norm; pairs halves of a head",
}


def measure(name: str, tokens: int, heads: int, scale: Scale, bandwidth: float) -> dict[str, Found]:
    """Time one peer forward and backward at one size.

    Raises:
        ImportError: it isn't installed.
    """
    width = heads * scale.head_width
    if "rotary" in name:
        way = _ROTARY[name](tokens, scale)
        inputs = tuple(_random(scale, tokens, heads, scale.head_width) for _ in range(2))
    else:
        parameters = [_random(scale, width) for _ in range(2)]
        way = _NORMS[name](width, parameters, scale)
        inputs = (_random(scale, tokens, width),)
    moved = sum(x.numel() * x.element_size() for x in inputs)
    least = (2.0 * moved, (2.0 if "rotary" in name else 3.0) * moved)
    found = both_ways({"ms": way}, inputs, (), least, bandwidth, scale)
    return {f"{name} {direction}": {**each, "remark": PEERS[name]} for direction, each in found.items()}


def _liger(width: int, parameters: list[torch.Tensor], scale: Scale) -> Call:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return lambda x: (LigerLayerNormFunction.apply(x, *parameters, 1e-5),)


def _te_norm(width: int, parameters: list[torch.Tensor], scale: Scale) -> Call:
    from transformer_engine.pytorch import LayerNorm

    norm = LayerNorm(width, eps=1e-5, params_dtype=scale.dtype, device=scale.device)
    return lambda x: (norm(x),)


def _apex(width: int, parameters: list[torch.Tensor], scale: Scale) -> Call:
    from apex.normalization import FusedLayerNorm

    norm = FusedLayerNorm(width, eps=1e-5).to(scale.device, scale.dtype)
    return lambda x: (norm(x),)


def _flash_rotary(tokens: int, scale: Scale) -> Call:
    from flash_attn.layers.rotary import apply_rotary_emb

    angles = _angles(tokens, scale)
    cos, sin = angles.cos().to(scale.dtype), angles.sin().to(scale.dtype)

    def way(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(apply_rotary_emb(x[None], cos, sin, interleaved=True)[0] for x in (q, k))

    return way


def _te_rotary(tokens: int, scale: Scale) -> Call:
    from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

    angles = _angles(tokens, scale).repeat(1, 2)[:, None, None]  # [S, 1, 1, K], fp32

    def way(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(apply_rotary_pos_emb(x[:, None], angles, tensor_format="sbhd", fused=True)[:, 0] for x in (q, k))

    return way


def _angles(tokens: int, scale: Scale) -> torch.Tensor:
    frequencies = 1e4 ** -torch.linspace(0, 1, scale.head_width // 2, device=scale.device)
    return torch.arange(tokens, device=scale.device)[:, None] * frequencies


def _random(scale: Scale, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=scale.device, dtype=scale.dtype)


_NORMS: dict[str, Callable[[int, list[torch.Tensor], Scale], Any]] = {
    "Liger-Kernel LayerNorm": _liger,
    "Transformer Engine LayerNorm": _te_norm,
    "apex FusedLayerNorm": _apex,
}
_ROTARY: dict[str, Callable[[int, Scale], Any]] = {
    "flash-attn rotary": _flash_rotary,
    "Transformer Engine rotary": _te_rotary,
}
