"""Drops and Offer: every choice once, and no sample given twice."""

import numpy as np

from megacogvx.data.offers import PAIRS_UP_TO, RUN, Drops, Offer


def columns(lengths):
    lengths = np.array([*lengths, 0], np.int64)
    return lengths, lengths**2


def test_drops_are_none_one_or_two_and_never_barred():
    lengths, costs = columns([5, 3, 8, 4])
    drops = Drops([[0, 1, 2], [3]], lengths, costs, np.array([False, False, True, False, False]))
    rows = [(int(drops.pack[row]), tuple(sorted(drops.candidates(row)))) for row in range(len(drops.pack))]
    assert sorted(rows) == [(0, ()), (0, (0,)), (0, (0, 1)), (0, (1,)), (1, ()), (1, (3,))]
    for row in range(len(rows)):
        given = drops.candidates(row)
        assert drops.tokens[row] == lengths[given].sum() and drops.costs[row] == costs[given].sum()


def test_large_packs_drop_runs_of_neighbouring_lengths():
    count = PAIRS_UP_TO + 4
    lengths, costs = columns(np.random.default_rng(0).permutation(count) + 1)
    drops = Drops([list(range(count))], lengths, costs, np.zeros(count + 1, bool))
    sizes = {len(drops.candidates(row)) for row in range(len(drops.pack))}
    assert sizes == set(range(RUN + 1))
    for row in range(len(drops.pack)):
        given = np.sort(lengths[drops.candidates(row)])
        assert (np.diff(given) == 1).all() and drops.tokens[row] == given.sum()


def test_samples_of_one_length_queue_and_run_out():
    lengths, costs = columns([10, 10, 7, 10])
    offer = Offer(np.arange(4), lengths, costs, 100, 0.1, 9)
    (row,) = np.flatnonzero(offer.tokens == 20)
    assert offer.take(int(row)) == [0, 1]
    assert offer.take(int(row)) is None  # one of that length is left
    offer.refresh()
    assert sorted(offer.tokens.tolist()) == [0, 7, 10, 17]
    (row,) = np.flatnonzero(offer.tokens == 17)
    assert sorted(offer.take(int(row))) == [2, 3]
    offer.refresh()
    assert offer.tokens.tolist() == [0]


def test_the_neighbours_of_the_wanted_cost_are_near():
    draw = np.random.default_rng(1)
    lengths, costs = columns(draw.integers(1000, 40_000, 60))
    offer = Offer(np.arange(60), lengths, costs << 8, 100_000, 0.004, 60)
    for row in draw.integers(0, len(offer.tokens), 50).tolist():
        rows = offer.near(offer.tokens[row : row + 1], offer.costs[row : row + 1], 2)[0]
        found = np.abs(offer.costs[rows] - offer.costs[row]) + np.abs(offer.tokens[rows] - offer.tokens[row])
        assert found.min() <= 1 << 12
