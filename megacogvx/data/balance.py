"""Which waiting samples share a pack: packs full of tokens, and all of equal cost.

Filling packs alone isn't enough: attention costs L^2, so a pack of one long clip takes far longer than an equally full
pack of images, and a step takes as long as its costliest pack. The method:
 1. the oldest samples, a step's worth of tokens, are dealt out: costliest first, each to the pack with the least cost
    that has room (longest processing time first; Graham 1969);
 2. in rounds, every pack that isn't good yet drops some samples and takes up to two from the reserve, whichever brings
    it closest to full and to the mean cost (this fills gaps as well); all packs search at once (`offers.py`), and where
    two want the same sample, the one that gains most has it;
 3. the costliest pack exchanges up to two samples with cheap ones, else with the reserve, until it is near the mean.
All of it is integer arithmetic, so that two machines can't round their way to different plans.
"""

from __future__ import annotations

from bisect import insort

import numpy as np

from megacogvx.data.offers import BINS, NEVER, Drops, Offer

RESERVE = 128  # lengths of the reserve that are offered at a time, alone and as pairs, those of the oldest samples
WINDOW = 0.004  # of the budget: how far from full the bins of an offer reach
ROUNDS = 2  # of improvement, with one offer
OFFERS = 3  # a fresh one holds what was dropped, and the next samples of the reserve
CHOICES = 12  # best changes that each pack proposes in a round
# For the packs that stay too costly, round by round: how much less unused tokens count (and wider the window is), and
# how far above the mean cost, as a share of it, a pack may stay.
PATIENCE = ((1, 0.006), (3, 0.006), (9, 0.009), (9, 0.009))
EXCHANGES = 4  # per pack, at most
PARTNERS = 12  # packs, cheapest first, with which the costliest one tries to exchange
GOOD_ENOUGH = 0.003  # of the mean cost: a pack as good as this is left alone
CLOSE_ENOUGH = 0.0005  # of the mean cost: nothing is moved for less


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
        self.lengths, self.costs = np.append(lengths, 0), np.append(costs, 0)  # the last is nobody, see `offers.py`
        self.indices, self.ages = indices, ages
        self.budget, self.protected = budget, np.append(ages >= protected_age, False)
        self.members: list[list[int]] = [[] for _ in range(packs)]
        self.room = np.full(packs, budget, np.int64)
        self.load = np.zeros(packs, np.int64)
        self._usable = np.ones(len(lengths) + 1, bool)
        self.has_twins = len(np.unique(indices)) < len(indices)

    @property
    def free(self) -> np.ndarray:
        """Which candidates are in no pack, bool `[n]`."""
        return self._usable[:-1]

    def run(self) -> list[list[int]]:
        """Return the candidates of each pack."""
        self._deal()
        self._improve_from_reserve()
        self._even_out()
        return self.members

    def _deal(self) -> None:
        """Deal the oldest samples, protected ones first, then the costliest, each to the cheapest pack with room."""
        lengths = self.lengths[:-1]
        due = np.flatnonzero(np.cumsum(lengths) - lengths < self.budget * len(self.members))
        first = np.where(self.protected[:-1], -self.ages, 0)
        due = due[np.lexsort((-self.costs[due], first[due]))]
        room = self.room.tolist()
        ranked = list(zip(self.load.tolist(), range(len(room)), strict=True))  # cheapest first
        rows = zip(due.tolist(), lengths[due].tolist(), self.costs[due].tolist(), strict=True)
        for candidate, length, cost in rows:
            for rank, (load, pack) in enumerate(ranked):
                if room[pack] >= length and not self._has_twin(pack, candidate):
                    del ranked[rank]
                    insort(ranked, (load + cost, pack))
                    room[pack] -= length
                    self._add(pack, candidate)
                    break

    def _improve_from_reserve(self) -> None:
        used = self.budget * len(self.members) - int(self.room.sum())
        target = int(self.load.sum()) * self.budget // used  # the mean cost, were the packs full
        for _ in range(OFFERS):
            if not self._improve_from(self._offer(), target):
                return  # the next offer would be the same

    def _improve_from(self, offer: Offer, target: int) -> bool:
        """Let the packs take from one offer, round by round; returns whether any did."""
        unsettled = np.ones(len(self.members), bool)
        for turn in range(ROUNDS):
            bad = self._badness(self.load, self.room, target) > target * GOOD_ENOUGH
            packs = np.flatnonzero(unsettled & bad)
            changed = self._improve(packs, target, offer) if len(packs) else set()
            if not changed:
                return turn > 0
            unsettled[:] = False
            unsettled[list(changed)] = True
        return True

    def _badness(self, load: np.ndarray, room: np.ndarray, target: int, patience: int = 1) -> np.ndarray:
        """Distance from the mean cost, plus what the unused tokens would cost, divided by `patience`."""
        return np.abs(load - target) + room * (target // self.budget // patience)

    def _offer(self) -> Offer:
        return Offer(np.flatnonzero(self.free), self.lengths, self.costs, self.budget, WINDOW, RESERVE)

    def _improve(self, packs: np.ndarray, target: int, offer: Offer, patience: int = 1) -> set[int]:
        """Let every one of `packs` make the change that brings it closest; returns those that did."""
        offer.refresh()
        drops = Drops([self.members[pack] for pack in packs], self.lengths, self.costs, self.protected)
        now = self._badness(self.load[packs], self.room[packs], target, patience)
        badness, rows = self._search(packs, drops, offer, target, patience)
        drop, near = np.nonzero(badness < now[drops.pack][:, None] - int(target * CLOSE_ENOUGH))
        badness, rows, place = badness[drop, near], rows[drop, near], drops.pack[drop]
        order = np.lexsort((badness, place))
        rank = np.arange(len(order)) - np.searchsorted(place[order], place[order])  # within its pack, best first
        order = order[rank < CHOICES]
        changed: set[int] = set()
        order = order[np.argsort((badness - now[place])[order], kind="stable")]
        columns = (packs[place[order]], drop[order], rows[order])
        for pack, given, row in zip(*(column.tolist() for column in columns), strict=True):
            if pack in changed or (take := offer.take(row)) is None:
                continue
            if self._change(pack, drops.candidates(given), take):
                changed.add(pack)
        return changed

    def _search(
        self, packs: np.ndarray, drops: Drops, offer: Offer, target: int, patience: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (badness, row of the offer) of the changes in sight, int64 `[drops, candidates]` each."""
        room = self.room[packs][drops.pack]
        most = room + drops.tokens
        rest = self.load[packs][drops.pack] - drops.costs
        rows = offer.near(most, target - rest, BINS * patience)
        left = most[:, None] - offer.tokens[rows]
        badness = self._badness(rest[:, None] + offer.costs[rows], left, target, patience)
        widest = np.maximum(room, int(self.budget * WINDOW * patience))[:, None]
        badness[(left < 0) | (left > widest)] = NEVER
        return badness, rows

    def _change(self, pack: int, give: list[int], take: list[int]) -> bool:
        """Drop `give` into the reserve and take `take` from it, if that is no twin."""
        if not self._fits(pack, give, take):
            return False
        for candidate in give:
            self._drop(pack, candidate)
        for candidate in take:
            self._add(pack, candidate)
        return True

    def _even_out(self) -> None:
        """Bring the costliest packs near the mean, by exchanges with cheap packs, else with the reserve.

        All packs wait for the costliest one, so these may give up some of their fill.
        """
        for patience, excess in PATIENCE:
            self._exchange_between_packs(excess)
            target = int(self.load.mean())
            packs = np.flatnonzero(self.load - target > int(target * excess))
            if not len(packs):
                return
            # Not down to the mean: where a few packs can only be cheap, the mean would flee before the others.
            self._improve(packs, target + int(target * excess) // 2, self._offer(), patience)

    def _exchange_between_packs(self, excess: float) -> None:
        for _ in range(EXCHANGES * len(self.members)):
            target = int(self.load.mean())
            worst = int(np.argmax(self.load))
            if self.load[worst] - target <= int(target * excess):
                return
            partners = np.argsort(self.load, kind="stable")[:PARTNERS]
            if not self._exchange(worst, partners[partners != worst], target):
                return

    def _exchange(self, one: int, others: np.ndarray, target: int) -> bool:
        """Make the exchange of up to two samples each that brings `one` and another pack closest to `target`."""
        nobody = np.zeros_like(self.protected)  # what is exchanged stays in the step
        gives = Drops([self.members[one]], self.lengths, self.costs, nobody)
        takes = Drops([self.members[other] for other in others], self.lengths, self.costs, nobody)
        other = others[takes.pack]
        tokens, costs = gives.tokens[:, None] - takes.tokens, gives.costs[:, None] - takes.costs
        far = np.maximum(np.abs(self.load[one] - target - costs), np.abs(self.load[other] - target + costs))
        far[(tokens < -self.room[one]) | (tokens > self.room[other])] = NEVER
        now = np.maximum(abs(self.load[one] - target), np.abs(self.load[other] - target))
        far[far >= now] = NEVER
        tries = np.argsort(far, axis=None, kind="stable")[:8] if self.has_twins else [far.argmin()]
        for best in map(int, tries):
            give, take = best // far.shape[1], best % far.shape[1]
            if far[give, take] == NEVER:
                return False
            if self._swap(one, int(other[take]), gives.candidates(give), takes.candidates(take)):
                return True
        return False

    def _swap(self, one: int, other: int, give: list[int], take: list[int]) -> bool:
        if not (self._fits(one, give, take) and self._fits(other, take, give)):
            return False
        for source, target, moved in ((one, other, give), (other, one, take)):
            for candidate in moved:
                self._drop(source, candidate)
                self._add(target, candidate)
        return True

    def _fits(self, pack: int, without: list[int], plus: list[int]) -> bool:
        """Whether the pack holds no sample twice after dropping `without` and adding `plus`."""
        if not self.has_twins:
            return True
        rest = [self.indices[m] for m in self.members[pack] if m not in without] + [self.indices[m] for m in plus]
        return len(rest) == len(set(rest))

    def _has_twin(self, pack: int, candidate: int) -> bool:
        return self.has_twins and any(self.indices[m] == self.indices[candidate] for m in self.members[pack])

    def _add(self, pack: int, candidate: int) -> None:
        self.members[pack].append(candidate)
        self.room[pack] -= self.lengths[candidate]
        self.load[pack] += self.costs[candidate]
        self._usable[candidate] = False

    def _drop(self, pack: int, candidate: int) -> None:
        self.members[pack].remove(candidate)
        self.room[pack] += self.lengths[candidate]
        self.load[pack] -= self.costs[candidate]
        self._usable[candidate] = True


def integer_costs(lengths: np.ndarray, linear: float, quadratic: float, budget: int) -> np.ndarray:
    """Return `linear * L + quadratic * L^2` as int64, in units that give a budget-long sample about 2^40."""
    length = lengths.astype(np.float64)
    unit = (linear * budget + quadratic * budget * budget) / 2**40
    return np.maximum(1, np.rint((linear / unit) * length + (quadratic / unit) * (length * length))).astype(np.int64)
