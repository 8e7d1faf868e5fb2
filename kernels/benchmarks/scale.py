"""The sizes that are measured, and the tiny ones of a dry run, which walks through the same code on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Scale:
    """What a run measures with.

    Attributes:
        device: "cuda", or "cpu" for a dry run.
        tokens, heads: of the ops on tokens; a width is heads x head_width.
        text: tokens of the text in front of a sample's video.
        side: height and width of a sample's grid, in tokens.
        clip: channels, frames, height and width of the clip that is normed and whose frames are packed.
        shard: the same of the clip that virtual ranks share.
        packs: samples and tokens of each, for attention.
        attention_heads: heads of attention.
        copied: values of the copy whose bandwidth is measured.
        checked: random shapes that are held to the references first.
        beyond: tokens of 48 heads that make more than 2^31 elements of qkv, and of 3072 channels.
        repeats: calls of which the median is taken.
        compiler: torch.compile's backend.
        compiled: the sizes (tokens, heads) that torch.compile is timed at, the most important first.
    """

    device: str
    tokens: tuple[int, ...]
    heads: tuple[int, ...]
    text: int
    side: int
    clip: tuple[int, int, int, int]
    shard: tuple[int, int, int, int]
    packs: tuple[tuple[int, int], ...]
    attention_heads: int
    copied: int
    checked: int
    beyond: tuple[int, int]
    repeats: int
    compiler: str
    compiled: tuple[tuple[int, int], ...]
    head_width: int = 64
    dtype: torch.dtype = torch.bfloat16

    @property
    def is_dry(self) -> bool:
        """Whether times mean nothing."""
        return self.device == "cpu"


REAL = Scale(
    device="cuda",
    tokens=(75_000, 25_000, 700_000),
    heads=(48, 24, 6),
    text=226,
    side=50,
    clip=(128, 17, 240, 360),
    shard=(128, 16, 120, 180),
    packs=((1, 17_800), (4, 18_750), (1, 75_000)),
    attention_heads=48,
    copied=2**30,
    checked=40,
    beyond=(240_000, 700_000),
    repeats=15,
    compiler="inductor",
    compiled=(
        (75_000, 48),
        (25_000, 48),
        (75_000, 24),
        (75_000, 6),
        (700_000, 48),
        (25_000, 6),
        (25_000, 24),
        (700_000, 24),
        (700_000, 6),
    ),
)
DRY = Scale(
    device="cpu",
    tokens=(75, 25),
    heads=(2, 1),
    text=5,
    side=2,
    clip=(8, 3, 4, 6),
    shard=(8, 12, 4, 6),
    packs=((1, 18), (2, 9)),
    attention_heads=2,
    copied=2**10,
    checked=2,
    beyond=(24, 70),
    repeats=1,
    compiler="aot_eager",
    compiled=((75, 2),),
)
