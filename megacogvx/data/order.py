"""The endless shuffled stream of samples: which corpus index stands at position p.

Nothing is stored: the order of an epoch is a keyed bijection of 0..n-1 (a Feistel network with cycle walking; Luby and
Rackoff 1988, Black and Rogaway 2002), and the blend of weighted groups is integer arithmetic on p. So any rank, loader
or restart can ask for any position, at 35 million samples as at sixty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from megacogvx import draws
from megacogvx.data.corpus import Group

Bits = TypeVar("Bits", int, np.ndarray)  # 64 unsigned bits: one number, or uint64 `[n]`
ROUNDS = 6  # four make a Feistel network pseudo-random; two to spare for tiny domains
FEW = 10  # numbers up to which Python is quicker than arrays of them
ALL_BITS = 2**64 - 1


def shuffled(places: np.ndarray, count: int, round_keys: Sequence[int]) -> np.ndarray:
    """Map `places` through the bijection of 0..count-1 that `round_keys` choose.

    Args:
        places: int64, each in 0..count-1.
        round_keys: one 64-bit key a round.

    Returns:
        int64, of the same shape; different places give different results.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    result, rest = places.astype(np.uint64), np.arange(len(places))
    while len(rest) > FEW:  # follow the cycle until it comes back inside; it must, since it began inside
        result[rest] = _feistel(result[rest], half, round_keys)
        rest = rest[result[rest] >= count]
    for place in rest.tolist():
        value = _feistel(result.item(place), half, round_keys)
        while value >= count:
            value = _feistel(value, half, round_keys)
        result[place] = value
    return result.astype(np.int64)


def _feistel(values: Bits, half: int, round_keys: Sequence[int]) -> Bits:
    mask = (1 << half) - 1
    left, right = values >> half, values & mask
    for round_key in round_keys:
        left, right = right, left ^ (_mix((right + round_key) & ALL_BITS) & mask)
    return (left << half) | right


def _mix(values: Bits) -> Bits:
    """Scramble 64-bit numbers (the finalizer of splitmix64); the arithmetic wraps."""
    values = ((values ^ (values >> 30)) * 0xBF58476D1CE4E5B9) & ALL_BITS
    values = ((values ^ (values >> 27)) * 0x94D049BB133111EB) & ALL_BITS
    return values ^ (values >> 31)


class SampleOrder:
    """The stream of one run: position -> corpus index, for a seed and the groups of a corpus."""

    def __init__(self, groups: Sequence[Group], seed: int) -> None:
        self.groups, self.seed = tuple(groups), seed
        self._keys: dict[tuple[int, int], list[int]] = {}

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Return the corpus indices at `positions` (int64, any order).

        Of the first p positions a group holds its share of p, rounded; each of its samples comes once before any comes
        twice.
        """
        result = np.empty(len(positions), np.int64)
        rows, rest = np.arange(len(positions)), positions.astype(np.int64)
        remaining = sum(group.weight for group in self.groups)
        for number, group in enumerate(self.groups):
            before = rest * group.weight // remaining  # how many of the positions up to here were this group's
            here = (rest + 1) * group.weight // remaining > before
            result[rows[here]] = self._of_group(number, before[here])
            rows, rest = rows[~here], (rest - before)[~here]
            remaining -= group.weight
        return result

    def _of_group(self, number: int, places: np.ndarray) -> np.ndarray:
        group = self.groups[number]
        epochs, within = places // group.count, places % group.count
        result = np.empty(len(places), np.int64)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            result[chosen] = shuffled(within[chosen], group.count, self._round_keys(number, epoch))
        return result + group.start

    def _round_keys(self, number: int, epoch: int) -> list[int]:
        place = (number, epoch)
        if place not in self._keys:
            self._keys[place] = [draws.key(self.seed, "sample order", number, epoch, r) for r in range(ROUNDS)]
        return self._keys[place]
