"""What a pack may drop and take: tables over all packs at once, so that a step's search is a few array operations."""

from __future__ import annotations

from functools import cache

import numpy as np

NEVER = np.iinfo(np.int64).max
BINS = 2  # bins of tokens that make up the window below full
COST_SHIFT = 12  # costs are compared at 2^-28 of a budget-long sample's when candidates are looked up
PAIRS_UP_TO = 16  # samples in a pack up to which any two of them may be dropped at once
RUN = 8  # from larger packs up to so many samples of neighbouring lengths: it takes many images to make room for a clip


class Drops:
    """Ways to drop some samples of each of some packs: none, one, any two, or of large packs a run by length.

    Columns over candidates have one more entry, at their end, for nobody (-1).

    Attributes:
        pack: place in the list of packs that was given, int64 `[d]`, ascending.
        tokens, costs: of what is dropped, int64 `[d]`.
    """

    def __init__(self, members: list[list[int]], lengths: np.ndarray, costs: np.ndarray, barred: np.ndarray) -> None:
        """List the ways.

        Args:
            members: candidates of each pack.
            lengths, costs: columns over candidates, int64.
            barred: bool column; these candidates are never dropped.
        """
        counts = [len(pack) for pack in members]
        flat = np.array([member for pack in members for member in pack], np.int64)
        by_length = (np.repeat(np.arange(len(members)), counts) << 40) + lengths[flat]  # pack by pack
        self._flat = flat = flat[np.argsort(by_length, kind="stable")]
        tables = [_choices(count) for count in counts]
        self.pack = np.repeat(np.arange(len(members)), [len(table) for table in tables])
        table = np.concatenate(tables) + np.cumsum([0, *counts[:-1]])[self.pack][:, None]
        if barred[flat].any():
            allowed = _sum(barred[flat].astype(np.int64), table.T) == 0
            self.pack, table = self.pack[allowed], table[allowed]
        self._table = table
        spans = np.ascontiguousarray(table.T)
        self.tokens, self.costs = _sum(lengths[flat], spans), _sum(costs[flat], spans)

    def candidates(self, row: int) -> list[int]:
        """Return what row `row` drops."""
        first, end, second, second_end = self._table[row].tolist()
        return [*self._flat[first:end].tolist(), *self._flat[second:second_end].tolist()]


class Offer:
    """Nothing, each length of a reserve, and each pair of lengths, in order of (bin of tokens, cost).

    Samples of one length are one offer with a queue, oldest first: many clips are equally long, and all packs would
    otherwise fight over the same few. The order makes the pair that fits a gap a binary search away: of each bin just
    below full, the neighbours of the wanted cost. A key holds bin, cost and the pair's number, so that no two are equal
    and every machine sorts alike.

    Attributes:
        tokens, costs: of every single or pair, int64 `[n]`, in order.
    """

    def __init__(
        self, reserve: np.ndarray, lengths: np.ndarray, costs: np.ndarray, budget: int, window: float, limit: int
    ) -> None:
        """Offer the samples of `reserve`.

        Args:
            reserve: candidates, oldest first.
            lengths, costs: columns over candidates, int64; tokens, and `integer_costs`.
            budget: tokens of a pack; longer pairs are left out.
            window: of the budget, what `BINS` bins span.
            limit: lengths that are offered at most, those with the oldest samples; up to 2^9.
        """
        order = np.argsort(lengths[reserve], kind="stable")
        starts = np.flatnonzero(np.diff(lengths[reserve][order], prepend=-1))
        oldest = np.argsort(order[starts], kind="stable")[:limit]
        samples, counts = reserve[order], np.diff(starts, append=len(order))
        self._samples, self._next = samples.tolist(), starts[oldest].tolist()  # each length's queue, and its first
        self._left = np.append(counts[oldest], NEVER)  # the last is nobody, who never runs out
        nobody = len(oldest)
        one, two = _pairs(nobody)
        of_length = np.append(samples[starts[oldest]], -1)
        length, cost = lengths[of_length], costs[of_length]
        tokens = length.take(one, mode="clip") + length.take(two, mode="clip")  # the quickest of numpy's ways
        fits = tokens <= budget
        fits[one == two] &= self._left > 1
        fits = np.flatnonzero(fits)
        one, two, tokens = one[fits], two[fits], tokens[fits]
        pair_costs = cost.take(one, mode="clip") + cost.take(two, mode="clip")
        self._width = max(1, int(budget * window) // BINS)
        self._number_bits = max(1, (len(tokens) - 1).bit_length())
        keys = np.sort((self._key(tokens // self._width, pair_costs) << self._number_bits) + np.arange(len(tokens)))
        order = keys & ((1 << self._number_bits) - 1)
        self._keys = keys
        self._one, self._two, self.tokens, self.costs = (
            column.take(order, mode="clip") for column in (one, two, tokens, pair_costs)
        )

    def refresh(self) -> None:
        """Leave out what has been used up."""
        left = self._left
        kept = np.flatnonzero((left[self._one] > (self._one == self._two)) & (left[self._two] > 0))
        if len(kept) < len(self._keys):
            for name in ("_keys", "_one", "_two", "tokens", "costs"):
                setattr(self, name, getattr(self, name)[kept])

    def take(self, row: int) -> list[int] | None:
        """Return the oldest candidates of row `row`, which are used up by that; None if there are not enough left."""
        one, two, left = self._one.item(row), self._two.item(row), self._left
        if left[one] <= (one == two) or left[two] < 1:
            return None
        return [self._first(place) for place in (one, two) if place < len(self._next)]

    def _first(self, place: int) -> int:
        """Take the first of a length's queue."""
        self._left[place] -= 1
        self._next[place] += 1
        return self._samples[self._next[place] - 1]

    def near(self, tokens: np.ndarray, costs: np.ndarray, bins: int) -> np.ndarray:
        """Return rows close below `tokens` and on both sides of `costs`: int64 `[n, 2 * (bins + 1)]`.

        Where a bin is empty, rows of another bin stand in its place; they may not fit.
        """
        wanted = np.maximum(tokens // self._width - np.arange(bins + 1)[:, None], 0)
        keys = self._key(wanted, np.clip(costs, 0, (1 << 41) - 1)) << self._number_bits
        above = np.searchsorted(self._keys, keys.ravel()).reshape(keys.shape)
        rows = np.concatenate([above, above - 1])
        return np.clip(rows, 0, len(self._keys) - 1).T

    @staticmethod
    def _key(bins: np.ndarray, costs: np.ndarray) -> np.ndarray:
        return (bins << (42 - COST_SHIFT)) + (costs >> COST_SHIFT)


def _sum(column: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """Return the sums of `column` over two spans each: rows of first, end, second, second end, int64 `[4, n]`."""
    first, end, second, second_end = np.append(0, np.cumsum(column))[spans]
    return end - first + second_end - second


@cache
def _choices(count: int) -> np.ndarray:
    """Return what may be dropped of `count` places, as two spans: int64 `[c, 4]` of first, end, second, second end."""
    if count > PAIRS_UP_TO:
        first, size = np.divmod(np.arange(count * RUN), RUN)
        first, end = first[first + size < count], (first + size + 1)[first + size < count]
        return np.stack([*([0, *values] for values in (first, end)), *[np.zeros(len(first) + 1, np.int64)] * 2], 1)
    first, second = np.triu_indices(count, k=1)
    single = np.arange(count)
    table = np.concatenate(
        [[[0, 0, 0, 0]], np.stack([single, single + 1, single, single], 1),
         np.stack([first, first + 1, second, second + 1], 1)]
    )  # fmt: skip
    return table


@cache
def _pairs(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return places (one, two) of nothing, of each single and of each pair; `count` stands for nobody."""
    return np.triu_indices(count + 1)
