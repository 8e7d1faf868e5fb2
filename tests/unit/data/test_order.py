"""The shuffled stream: a bijection per epoch, weights kept, nothing depends on how it is asked."""

import numpy as np
import pytest

from megacogvx.data.corpus import Group
from megacogvx.data.order import SampleOrder, shuffled

KEYS = [11, 22, 33, 44, 55, 66]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 60, 64, 65, 1000, 4097])
def test_bijection(count):
    assert sorted(shuffled(np.arange(count), count, KEYS).tolist()) == list(range(count))


def test_looks_random():
    count = 10_000
    order = shuffled(np.arange(count), count, KEYS)
    place = np.arange(count)
    assert abs(np.corrcoef(order, place)[0, 1]) < 0.04  # four standard deviations
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.04
    assert (
        2 <= len(np.flatnonzero(np.abs(np.diff(order)) == 1)) + 2 <= 14
    )  # neighbours stay neighbours twice on average


def test_epochs_and_seeds_differ_and_each_is_complete():
    order = SampleOrder([Group(0, 60, 1)], seed=3)
    epochs = order.at(np.arange(180)).reshape(3, 60)
    assert all(sorted(epoch) == list(range(60)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    assert epochs[0].tolist() != SampleOrder([Group(0, 60, 1)], seed=4).at(np.arange(60)).tolist()


def test_any_position_can_be_asked_for():
    order = SampleOrder([Group(0, 10, 3), Group(10, 7, 2)], seed=0)
    everything = order.at(np.arange(500))
    asked = np.array([499, 3, 250, 3])
    assert SampleOrder([Group(0, 10, 3), Group(10, 7, 2)], seed=0).at(asked).tolist() == everything[asked].tolist()


def test_weights_are_kept_everywhere_and_each_group_has_its_own_epochs():
    groups = [Group(0, 10, 5), Group(10, 40, 3), Group(50, 7, 2)]
    stream = SampleOrder(groups, seed=1).at(np.arange(1000))
    for group in groups:
        mine = (stream >= group.start) & (stream < group.start + group.count)
        share = np.cumsum(mine) - np.arange(1, 1001) * group.weight / 10
        assert np.abs(share).max() <= 2  # never more than two samples off, at any point of the stream
        drawn = stream[mine]
        for epoch in range(len(drawn) // group.count):
            part = drawn[epoch * group.count : (epoch + 1) * group.count]
            assert sorted(part.tolist()) == list(range(group.start, group.start + group.count))
