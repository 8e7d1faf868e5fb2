"""The ranks of one attempt meet, though the store remembers another."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from megacogvx.errors import LaunchError
from megacogvx.parallel.attempt import meet

SECONDS = timedelta(seconds=20)


def attempt(store: dist.Store, order: list[int]) -> str:
    """Let the ranks come one after the other, with time to take up an old invitation; return what all of them got."""
    found = []
    with ThreadPoolExecutor(len(order)) as pool:
        for rank in order:
            found.append(pool.submit(meet, store, rank, len(order), SECONDS))
            time.sleep(0.1)
    (name,) = {future.result() for future in found}
    return name


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_attempts_on_one_store_have_names_of_their_own(order):
    store = dist.HashStore()
    names = [attempt(store, order) for _ in range(3)]
    assert len(set(names)) == 3


def test_a_world_of_another_size_meets_on_the_same_store():
    store = dist.HashStore()
    assert attempt(store, [0, 1]) != attempt(store, [3, 2, 1, 0])


def test_ranks_that_do_not_come_are_named():
    store = dist.HashStore()
    short = timedelta(seconds=0.2)
    with ThreadPoolExecutor(2) as pool:
        first, third = pool.submit(meet, store, 0, 6, short), pool.submit(meet, store, 2, 6, short)
        with pytest.raises(LaunchError, match=r"rank\(s\) 1, 3-5 of 6 have not come"):
            first.result()
        with pytest.raises(LaunchError, match="rank 2 was not counted in by rank 0"):
            third.result()
