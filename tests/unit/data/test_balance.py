"""Balancer: deals within the budget, keeps old samples, evens out costs."""

import numpy as np

from megacogvx.data.balance import Balancer, integer_costs

BUDGET = 100


def balancer(lengths, packs, *, ages=None, indices=None, quadratic=0.1, protected_age=4):
    lengths = np.array(lengths, np.int64)
    indices = np.arange(len(lengths)) if indices is None else np.array(indices)
    ages = np.zeros(len(lengths), np.int64) if ages is None else np.array(ages)
    costs = integer_costs(lengths, 1.0, quadratic, BUDGET)
    return Balancer(lengths, costs, indices, ages, packs, BUDGET, protected_age)


def test_integer_costs_follow_the_formula():
    lengths = np.array([1, 10, 50, 100])
    costs = integer_costs(lengths, 3.0, 0.5, 100)
    assert costs.dtype == np.int64
    exact = 3.0 * lengths + 0.5 * lengths**2
    assert np.allclose(costs / costs[-1], exact / exact[-1], rtol=1e-9)


def test_long_samples_are_spread():
    """Two long samples and eight short ones fill two packs either way; only one way is balanced."""
    packs = balancer([60, 40, 10, 10, 10, 10, 20, 20, 20], 2, quadratic=1.0).run()
    sums = [sum([60, 40, 10, 10, 10, 10, 20, 20, 20][member] for member in pack) for pack in packs]
    assert sums == [100, 100]
    assert {0, 1} not in [set(pack) for pack in packs]
    assert any(0 in pack for pack in packs)


def test_gaps_are_filled_with_pairs_from_the_reserve():
    lengths = [70, 62, 60, 60, 13, 17, 25, 12]  # two long ones are dealt; 30 = 13 + 17 and 38 ~ 25 + 12 fill up
    packs = balancer(lengths, 2, quadratic=0.0).run()
    assert sorted(sum(lengths[member] for member in pack) for pack in packs) == [99, 100]


def test_old_samples_leave_first_and_are_not_put_back():
    """The old one fits so badly that every exchange would rather drop it."""
    lengths = [51, 50, 50, 50, 50, 50, 50, 50]
    done = balancer(lengths, 2, ages=[5, 0, 0, 0, 0, 0, 0, 0])
    assert any(0 in pack for pack in done.run())
    assert not done.free[0]
    young = balancer(lengths, 2)
    assert not any(0 in pack for pack in young.run())


def test_old_samples_are_dealt_before_costlier_ones():
    """Four samples of half a budget would fill both packs; the short old one has to go."""
    lengths = [10, 50, 50, 50, 50]
    assert any(0 in pack for pack in balancer(lengths, 2, ages=[5, 0, 0, 0, 0]).run())
    assert not any(0 in pack for pack in balancer(lengths, 2).run())


def test_twins_never_share_a_pack():
    lengths, indices = [25] * 16, [0, 1, 2, 3] * 4
    packs = balancer(lengths, 3, indices=indices).run()
    assert all(len({indices[member] for member in pack}) == len(pack) == 4 for pack in packs)


def test_exchange_keeps_twins_apart():
    """The most even exchange, 60 for 40, would bring the twins together."""
    lengths, indices = [60, 30, 40, 20], [0, 1, 2, 0]
    done = balancer(lengths, 2, indices=indices, quadratic=0.0)
    for pack, members in enumerate(([0, 1], [2, 3])):
        for member in members:
            done._add(pack, member)
    for _ in range(4):
        done._exchange(0, np.array([1]), int(done.load.mean()))
    assert all(len({indices[member] for member in pack}) == len(pack) for pack in done.members)


def test_books_are_kept():
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 60, 80)
    done = balancer(lengths, 8)
    packs = done.run()
    members = sorted(member for pack in packs for member in pack)
    assert members == np.flatnonzero(~done.free).tolist()
    assert len(set(members)) == len(members)
    for place, pack in enumerate(packs):
        assert done.room[place] == BUDGET - lengths[pack].sum() >= 0
        assert done.load[place] == done.costs[pack].sum() > 0
