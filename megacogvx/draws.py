"""Every random number, from (seed, what, step, sample id ...) and never from a rank's running generator.

A draw is made on the CPU and moved, so a GPU sees the same numbers; ranks, workers and restarts can't change it
(the result does not depend on the layout).
"""

from __future__ import annotations

import struct

import torch
import xxhash

MASK_64 = (1 << 64) - 1


def key(seed: int, what: str, *place: int) -> int:
    """Mix (seed, what, place ...) into one 64-bit key.

    Args:
        seed: the run's seed.
        what: what is drawn, e.g. "noise"; different names give independent streams.
        place: integers that say where, e.g. (step, sample id, latent frame); taken modulo 2^64.
    """
    packed = struct.pack(f"<{len(place) + 1}Q", seed & MASK_64, *(number & MASK_64 for number in place))
    return int(xxhash.xxh3_64_intdigest(what.encode() + b"\0" + packed))


def generator(seed: int, what: str, *place: int) -> torch.Generator:
    """Return a fresh CPU generator for one draw, seeded by `key(seed, what, *place)`."""
    return torch.Generator().manual_seed(key(seed, what, *place))


def uniform(seed: int, what: str, *place: int) -> float:
    """Draw one number from [0, 1), exact to 53 bits."""
    return (key(seed, what, *place) >> 11) / (1 << 53)


def normal(shape: tuple[int, ...], seed: int, what: str, *place: int) -> torch.Tensor:
    """Draw a fp32 CPU tensor of `shape` from N(0, 1)."""
    return torch.randn(shape, generator=generator(seed, what, *place))


def normal_frames(frames: range, shape: tuple[int, ...], seed: int, what: str, *place: int) -> torch.Tensor:
    """Draw N(0, 1) for some latent frames of a sample, each frame from a generator of its own.

    A rank that holds frames 3..5 draws just those, and gets what every other rank would.

    Args:
        frames: which latent frames.
        shape: shape of one frame, e.g. (C, H, W).

    Returns:
        fp32 CPU tensor `[len(frames), *shape]`.
    """
    if not len(frames):
        return torch.empty((0, *shape))
    return torch.stack([normal(shape, seed, what, *place, frame) for frame in frames])


def permutation(count: int, seed: int, what: str, *place: int) -> list[int]:
    """Draw a random order of `range(count)`."""
    return torch.randperm(count, generator=generator(seed, what, *place)).tolist()
