"""Which waiting samples share a pack: packs full of tokens, and all of equal cost.

Filling packs alone isn't enough: attention costs L^2, so a pack of one long clip takes far longer than an equally full
pack of images, and a step takes as long as its costliest pack. The method:
 1. the oldest samples, a step's worth of tokens, are dealt out: costliest first, each to the pack with the least cost
    that has room (longest processing time first; Graham 1969);
 2. each pack, worst first, drops up to two samples and takes up to two from the reserve, whichever brings it closest
    to full and to the mean cost (this fills gaps as well);
 3. the costliest pack exchanges up to two samples with cheap ones, else with the reserve, until it is near the mean.
All of it is integer arithmetic, so that two machines can't round their way to different plans.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np

RESERVE = 320  # oldest samples of the reserve that are offered at a time, alone and as pairs
REFRESH = 48  # improved packs after which a fresh offer is made
WINDOW = 0.004  # of the budget: how far from full an offer may leave a pack, at first
PAIRS_UP_TO = 12  # samples in a pack up to which two of them may be dropped at once
PASSES = 3
EVEN_ENOUGH = 0.006  # of the mean cost: how far above it the costliest pack may stay
PATIENCE = 3  # how much less unused tokens count, and wider the window is, for the costliest pack
EXCHANGES = 4  # per pack, at most
PARTNERS = 24  # packs, cheapest first, with which the costliest one tries to exchange
GOOD_ENOUGH = 0.002  # of the mean cost: a pack as good as this is left alone
CLOSE_ENOUGH = 0.0005  # of the mean cost: nothing is moved for less
NEVER = np.iinfo(np.int64).max


class Balancer:
    """Deals the samples of a step to its packs.

    Attributes:
        members: per pack the chosen candidates.
    """

    def __init__(
        self, lengths: np.ndarray, costs: np.ndarray, indices: np.ndarray, ages: np.ndarray, packs: int, budget: int,
        protected_age: int,
    ) -> None:  # fmt: skip
        """Take the candidates, oldest first.

        Args:
            lengths: tokens, int64 `[n]`, each at most `budget`.
            costs: int64 `[n]`, see `integer_costs`.
            indices: corpus indices, int64 `[n]`; a pack never holds one twice.
            ages: steps that each has waited, int64 `[n]`.
            packs: how many packs to fill.
            budget: tokens of a pack.
            protected_age: from this age on a candidate is dealt first, oldest first, and never dropped again.
        """
        self.lengths, self.costs, self.indices, self.ages = lengths, costs, indices, ages
        self.budget, self.protected = budget, ages >= protected_age
        self.members: list[list[int]] = [[] for _ in range(packs)]
        self.room = np.full(packs, budget, np.int64)
        self.load = np.zeros(packs, np.int64)
        self.free = np.ones(len(lengths), bool)
        self.has_twins = len(np.unique(indices)) < len(indices)

    def run(self) -> list[list[int]]:
        """Return the candidates of each pack."""
        self._deal()
        for _ in range(PASSES):
            self._improve_from_reserve()
        self._exchange_between_packs()
        return self.members

    def _deal(self) -> None:
        total = np.cumsum(self.lengths)
        due = np.flatnonzero(total - self.lengths < self.budget * len(self.members))
        first = np.where(self.protected, -self.ages, 0)
        for candidate in due[np.lexsort((-self.costs[due], first[due]))].tolist():
            load = np.where(self.room >= self.lengths[candidate], self.load, NEVER)
            if self.has_twins:
                load[[self._has_twin(members, candidate) for members in self.members]] = NEVER
            pack = int(np.argmin(load))
            if load[pack] < NEVER:
                self._add(pack, candidate)

    def _improve_from_reserve(self) -> None:
        used = self.budget * len(self.members) - int(self.room.sum())
        target = int(self.load.sum()) * self.budget // used  # the mean cost, were the packs full
        badness = self._badness(self.load, self.room, target)
        order = [pack for pack in np.argsort(-badness, kind="stable").tolist() if badness[pack] > target * GOOD_ENOUGH]
        for start in range(0, len(order), REFRESH):
            offer = self._offer()
            for pack in order[start : start + REFRESH]:
                self._improve(pack, target, offer)

    def _badness(self, load: np.ndarray, room: np.ndarray, target: int, patience: int = 1) -> np.ndarray:
        """Distance from the mean cost, plus what the unused tokens would cost, divided by `patience`."""
        return np.abs(load - target) + room * (target // self.budget // patience)

    def _offer(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return (tokens, cost, first, second) of nothing, the reserve's samples and their pairs, by tokens."""
        reserve = np.flatnonzero(self.free)[:RESERVE]
        first, second = np.triu_indices(len(reserve), k=1)
        first, second = reserve[first], reserve[second]
        if self.has_twins:
            different = self.indices[first] != self.indices[second]
            first, second = first[different], second[different]
        none = np.full(len(reserve) + 1, -1)
        first, second = np.concatenate([[-1], reserve, first]), np.concatenate([none, second])
        tokens = self._value(self.lengths, first) + self._value(self.lengths, second)
        order = np.argsort(tokens, kind="stable")
        first, second = first[order], second[order]
        return tokens[order], self._value(self.costs, first) + self._value(self.costs, second), first, second

    @staticmethod
    def _value(column: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        return np.append(column, 0)[chosen]  # -1, nobody, is the appended 0

    def _improve(self, pack: int, target: int, offer: tuple[np.ndarray, ...], patience: int = 1) -> bool:
        tokens, costs, first, second = offer
        drops = self._drops(pack)
        drop_tokens, drop_costs = self._sums(self.lengths, drops), self._sums(self.costs, drops)
        most = self.room[pack] + drop_tokens
        window = max(1, int(self.budget * WINDOW * patience))
        low, high = np.searchsorted(tokens, most - window), np.searchsorted(tokens, most, side="right")
        if not (high > low).any():  # nothing fits this well: look at everything that fits, without dropping anything
            low, high = np.zeros_like(low), np.where(drop_tokens == 0, high, 0)
        counts = high - low
        which = np.repeat(np.arange(len(drops)), counts)
        place = np.arange(len(which)) + np.repeat(low - np.cumsum(counts) + counts, counts)
        usable = np.append(self.free, True)
        if self.has_twins:
            usable[:-1] &= ~np.isin(self.indices, self.indices[self.members[pack]])
        load = self.load[pack] - drop_costs[which] + costs[place]
        badness = self._badness(load, most[which] - tokens[place], target, patience)
        badness[~(usable[first[place]] & usable[second[place]])] = NEVER
        if not len(badness):
            return False
        best = int(np.argmin(badness))
        now = self._badness(self.load[pack], self.room[pack], target, patience)
        if badness[best] >= now - int(target * CLOSE_ENOUGH):
            return False
        for candidate in drops[which[best]]:
            self._drop(pack, candidate)
        for candidate in (int(first[place[best]]), int(second[place[best]])):
            if candidate >= 0:
                self._add(pack, candidate)
        return True

    def _drops(self, pack: int, protected: bool = False) -> list[tuple[int, ...]]:
        free = [candidate for candidate in self.members[pack] if protected or not self.protected[candidate]]
        pairs = combinations(free, 2) if len(free) <= PAIRS_UP_TO else ()
        return [(), *((candidate,) for candidate in free), *pairs]

    def _exchange_between_packs(self) -> None:
        """Lower the costliest pack by exchanges with other packs, else with the reserve, until nothing helps.

        All packs wait for the costliest one, so it may now give up some of its fill.
        """
        offer = None
        for _ in range(EXCHANGES * len(self.members)):
            target = int(self.load.mean())
            worst = int(np.argmax(self.load))
            if self.load[worst] - target <= int(target * EVEN_ENOUGH):
                return
            partners = np.argsort(self.load, kind="stable")[:PARTNERS].tolist()
            if any(self._exchange(worst, partner, target) for partner in partners if partner != worst):
                continue
            offer = self._offer() if offer is None else offer
            if not self._improve(worst, target, offer, patience=PATIENCE):
                return

    def _exchange(self, one: int, other: int, target: int) -> bool:
        """Make the exchange of up to two samples each that brings both packs closest to `target`, if any does."""
        gives, takes = self._drops(one, True), self._drops(other, True)
        tokens = self._sums(self.lengths, gives)[:, None] - self._sums(self.lengths, takes)[None, :]
        costs = self._sums(self.costs, gives)[:, None] - self._sums(self.costs, takes)[None, :]
        far = np.maximum(np.abs(self.load[one] - costs - target), np.abs(self.load[other] + costs - target))
        far[(self.room[one] + tokens < 0) | (self.room[other] - tokens < 0)] = NEVER
        now = max(abs(int(self.load[one]) - target), abs(int(self.load[other]) - target))
        for best in np.argsort(far, axis=None, kind="stable")[: 8 if self.has_twins else 1].tolist():
            give, take = gives[best // len(takes)], takes[best % len(takes)]
            if far.flat[best] >= now:
                return False
            if self._fits(one, give, take) and self._fits(other, take, give):
                for candidate in give:
                    self._drop(one, candidate)
                    self._add(other, candidate)
                for candidate in take:
                    self._drop(other, candidate)
                    self._add(one, candidate)
                return True
        return False

    def _fits(self, pack: int, without: tuple[int, ...], plus: tuple[int, ...]) -> bool:
        """Whether the pack holds no sample twice after dropping `without` and adding `plus`."""
        rest = [self.indices[m] for m in self.members[pack] if m not in without] + [self.indices[m] for m in plus]
        return len(rest) == len(set(rest))

    @staticmethod
    def _sums(column: np.ndarray, groups: list[tuple[int, ...]]) -> np.ndarray:
        return np.array([sum(column[member] for member in group) for group in groups], np.int64)

    def _has_twin(self, members: list[int], candidate: int) -> bool:
        return any(self.indices[member] == self.indices[candidate] for member in members)

    def _add(self, pack: int, candidate: int) -> None:
        self.members[pack].append(candidate)
        self.room[pack] -= self.lengths[candidate]
        self.load[pack] += self.costs[candidate]
        self.free[candidate] = False

    def _drop(self, pack: int, candidate: int) -> None:
        self.members[pack].remove(candidate)
        self.room[pack] += self.lengths[candidate]
        self.load[pack] -= self.costs[candidate]
        self.free[candidate] = True


def integer_costs(lengths: np.ndarray, linear: float, quadratic: float, budget: int) -> np.ndarray:
    """Return `linear * L + quadratic * L^2` as int64, in units that give a budget-long sample about 2^40."""
    length = lengths.astype(np.float64)
    unit = (linear * budget + quadratic * budget * budget) / 2**40
    return np.maximum(1, np.rint((linear / unit) * length + (quadratic / unit) * (length * length))).astype(np.int64)
