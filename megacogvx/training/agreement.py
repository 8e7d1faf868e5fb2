"""An error of one rank becomes an error of all: none waits in a collective for a rank that has left.

What every rank raises at the same place lets the run finish what the ranks have begun together, such as the save that
is on its way to disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from megacogvx.errors import AgreedError, MegacogvxError
from megacogvx.log import get_logger
from megacogvx.parallel.groups import ParallelGroups, any_rank, gather_json

Item = TypeVar("Item")
logger = get_logger(__name__)


@contextmanager
def agreed(groups: ParallelGroups, what: str) -> Iterator[None]:
    """Run a block that may fail on some ranks; every rank enters it, and it must not communicate.

    Args:
        groups: process groups.
        what: the block does, for the error of the other ranks.

    Raises:
        AgreedError: on every rank, if the block failed on any; it names the ranks and says what they met. It ends the
            program with status 2 if one of them met a user's error, else with 1: a launcher may start it again.
    """
    problem, is_users = None, False
    try:
        yield
    except Exception as error:
        problem, is_users = f"{type(error).__name__}: {error}", isinstance(error, MegacogvxError)
        if not isinstance(error, MegacogvxError | OSError):
            logger.exception("%s failed", what)  # our mistake: the others learn its text, the log keeps its place
    if any_rank(problem is not None, groups):
        met = gather_json((problem, is_users), groups)
        texts = "; ".join(f"rank {rank}: {text}" for rank, (text, _) in enumerate(met) if text)
        raise AgreedError(f"{what} failed: {texts}", unforeseen=not any(users for _, users in met))


def read_together(
    items: Iterable[Item], groups: ParallelGroups, clock: Callable[[], float] = time.perf_counter
) -> Iterator[tuple[Item, float]]:
    """Yield what this rank's loader gives, and the seconds that this rank alone waited for it.

    Raises:
        AgreedError: on every rank, where the loader of any fails.
    """
    source = iter(items)
    while True:
        began = clock()
        with agreed(groups, "reading the data of a step"):
            item = next(source)
            seconds = clock() - began  # without the wait for a slower rank, which comes now
        yield item, seconds
