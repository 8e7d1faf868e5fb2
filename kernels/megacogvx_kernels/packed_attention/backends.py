"""The kernels that can compute `packed_attention`, each called as its maker says, and what each needs.

Signatures: flash-attn 2.8.3 (`flash_attn/flash_attn_interface.py`), FlashAttention 3 (`hopper/flash_attn_interface.py`
of the same repository), Transformer Engine 2.x (`transformer_engine/pytorch/attention/dot_product_attention`), torch
2.11 to 2.13 (`torch/nn/attention/varlen.py`). All but `reference` compute in bf16 and fp16 on a GPU only.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from megacogvx_kernels.packed_attention import on_cpu, reference
from megacogvx_kernels.packed_attention.kept_once import KeptOnce


@dataclass(frozen=True)
class Packed:
    """Where the samples of a pack lie, as kernels for sequences of unequal length want it.

    Attributes:
        boundaries: first token of each sample, then the end of the last one, on the host.
        cu_seqlens: the same as int32 tensor on the device.
    """

    boundaries: Sequence[int]
    cu_seqlens: torch.Tensor

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max((stop - start for start, stop in pairwise(self.boundaries)), default=0)


Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def torchs_own(tensors: Tensors, packed: Packed) -> torch.Tensor:
    """The definition; on a CPU the same through `on_cpu`, which keeps less."""
    attention = on_cpu if tensors[0].device.type == "cpu" else reference
    return attention.packed_attention(*tensors, packed.boundaries)


def cudnn(tensors: Tensors, packed: Packed) -> torch.Tensor:
    """One dense call of cuDNN's attention per sample; flash-attn's for one that cuDNN won't take (a single token)."""
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    with sdpa_kernel(order, set_priority=True), KeptOnce() as once:
        return once.join(reference.of_each_sample(*tensors, packed.boundaries))


def flash2(tensors: Tensors, packed: Packed) -> torch.Tensor:
    """flash-attn's kernel for sequences of unequal length (Dao 2023)."""
    from flash_attn import flash_attn_varlen_func

    return _first(flash_attn_varlen_func(*tensors, *_twice(packed), dropout_p=0.0, causal=False))


def flash3(tensors: Tensors, packed: Packed) -> torch.Tensor:
    """The same for Hopper (Shah et al. 2024)."""
    from flash_attn_interface import flash_attn_varlen_func

    return _first(flash_attn_varlen_func(*tensors, *_twice(packed), causal=False))


def varlen(tensors: Tensors, packed: Packed) -> torch.Tensor:
    """The copy of flash-attn 2 in torch itself."""
    from torch.nn.attention.varlen import varlen_attn

    queries, keys, most_queries, most_keys = _twice(packed)
    return _first(varlen_attn(*tensors, queries, keys, most_queries, most_keys))


def transformer_engine(tensors: Tensors, packed: Packed) -> torch.Tensor:
    """Transformer Engine's choice among its kernels, mostly cuDNN's with ragged offsets."""
    q_SNK = tensors[0]
    out: torch.Tensor = _te_module(*q_SNK.shape[1:])(
        *tensors,
        qkv_format="thd",
        attn_mask_type="padding",
        cu_seqlens_q=packed.cu_seqlens,
        cu_seqlens_kv=packed.cu_seqlens,
        max_seqlen_q=packed.longest,
        max_seqlen_kv=packed.longest,
    )
    return out.view(q_SNK.shape)  # it returns [S, N K]


KERNELS: dict[str, Callable[[Tensors, Packed], torch.Tensor]] = {
    "reference": torchs_own,
    "cudnn": cudnn,
    "flash2": flash2,
    "flash3": flash3,
    "varlen": varlen,
    "transformer_engine": transformer_engine,
}
BACKENDS = tuple(KERNELS)
_MODULES = {
    "flash2": ("flash_attn",),
    "flash3": ("flash_attn_interface",),
    "varlen": ("torch.nn.attention.varlen",),
    "transformer_engine": ("transformer_engine", "transformer_engine_torch"),
}


@lru_cache
def missing(name: str) -> str:
    """Return what the backend `name` lacks on this machine, or ""."""
    for module in _MODULES.get(name, ()):
        if importlib.util.find_spec(module) is None:
            return f"the module {module} can't be found"
    if name == "reference":
        return ""
    if not torch.cuda.is_available():
        return "there is no GPU"
    if name == "cudnn" and not torch.backends.cudnn.is_available():
        return "torch was built without cuDNN"
    if name == "flash3" and torch.cuda.get_device_capability() < (9, 0):
        return "the GPU is older than Hopper"
    return "" if torch.cuda.get_device_capability() >= (8, 0) else "the GPU is older than Ampere"


def attend(name: str, tensors: Tensors, packed: Packed) -> torch.Tensor:
    """Return the attention by backend `name`, zeros for the padding.

    Args:
        name: one of `BACKENDS`.
        tensors: q, k, v `[S, N, K]`.
        packed: the samples; tokens beyond the last are padding, which no kernel gets to see.
    """
    end = packed.boundaries[-1]
    if name in ("reference", "cudnn"):
        return KERNELS[name](tensors, packed)
    q, k, v = tensors
    with KeptOnce() as once:
        out = KERNELS[name]((q[:end], k[:end], v[:end]), packed)
        return out if end == len(q) else once.join([out, out.new_zeros(len(q) - end, *q.shape[1:])])


def _twice(packed: Packed) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Offsets and longest sample of the queries, and of the keys."""
    return packed.cu_seqlens, packed.cu_seqlens, packed.longest, packed.longest


def _first(result: Any) -> torch.Tensor:
    """The output alone; some versions return the log of the softmax's sum beside it."""
    out: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return out


@lru_cache
def _te_module(heads: int, width: int) -> Any:
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(heads, width, attention_dropout=0.0, qkv_format="thd", attn_mask_type="padding")
