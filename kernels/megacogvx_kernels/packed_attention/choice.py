"""Which backend of `packed_attention` answers for a pack, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from megacogvx_kernels.packed_attention.backends import BACKENDS, missing

# What makes one dense call a sample worth its launch. The host needs about 60 us for a call; on Hopper cuDNN computes
# at about 500 TFLOP/s and flash-attn 2 at about 300 (published figures for K = 64), so a call wins from
# 60 us / (1 / 300 - 1 / 500) on, 45 GFLOP. A model, not a measurement.
LONG_SAMPLE_FLOPS = 45e9
HOPPER = (9, 0)


@dataclass(frozen=True)
class Choice:
    """A backend's name, and why it was chosen, in words for the log."""

    name: str
    why: str


def choose_backend(q_SNK: torch.Tensor, boundaries: Sequence[int], asked: str = "auto") -> Choice:
    """Choose the backend for a pack; looks at shapes and host integers only, never at the tensor's values.

    Args:
        q_SNK: queries `[S, N, K]` of the pack, as `packed_attention` gets them.
        boundaries: of the pack.
        asked: one of `BACKENDS`, or "auto".

    Raises:
        ValueError: the backend asked for is unknown or can't be used here.
    """
    if asked != "auto":
        return _named(q_SNK, asked)
    if q_SNK.device.type != "cuda":
        return Choice("reference", f"tensors on {q_SNK.device.type}")
    if q_SNK.dtype not in (torch.bfloat16, torch.float16):
        return Choice("reference", f"{q_SNK.dtype} has no other kernel")
    hopper = torch.cuda.get_device_capability(q_SNK.device) >= HOPPER
    if hopper and not missing("flash3"):
        return Choice("flash3", "FlashAttention 3 is installed, the fastest on Hopper")
    if hopper and flops_per_sample(q_SNK, boundaries) >= LONG_SAMPLE_FLOPS:
        return Choice("cudnn", "few long samples: one dense call a sample is faster on Hopper")
    for name in ("flash2", "varlen", "transformer_engine"):
        if not missing(name):
            return Choice(name, "many short samples" if hopper else "a kernel for samples of unequal length")
    return Choice("reference", "no kernel for samples of unequal length is installed")


def flops_per_sample(q_SNK: torch.Tensor, boundaries: Sequence[int]) -> float:
    """Return the mean FLOPs of one sample's attention forward, 4 N K L^2."""
    squares = [(stop - start) ** 2 for start, stop in pairwise(boundaries) if stop > start]
    _, heads, width = q_SNK.shape
    return 4 * heads * width * sum(squares) / max(1, len(squares))


def _named(q_SNK: torch.Tensor, asked: str) -> Choice:
    if asked not in BACKENDS:
        raise ValueError(f"backend={asked!r} is not one of auto, {', '.join(BACKENDS)}")
    if problem := missing(asked):
        raise ValueError(f"backend={asked} of packed_attention can't be used: {problem}")
    half = q_SNK.dtype in (torch.bfloat16, torch.float16)
    if asked != "reference" and (q_SNK.device.type != "cuda" or not half):
        raise ValueError(f"backend={asked} takes bf16 or fp16 on a GPU, not {q_SNK.dtype} on {q_SNK.device.type}")
    return Choice(asked, "asked for")
