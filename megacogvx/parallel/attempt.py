"""Which attempt of a job the ranks belong to: those that are there now find each other, whatever a store remembers.

torchrun (2.13) starts ranks again with the store of those that died, whose addresses still lie in it. Its restart count
doesn't tell the attempts apart: a change of membership doesn't raise it, and the agent of a node that was replaced
counts from 0 again (`elastic/agent/server/api.py`, `_invoke_run`). So the first rank invites by a name that nobody
has used, and begins once every rank has answered to that name.
"""

from __future__ import annotations

import json
import time
from datetime import timedelta
from uuid import uuid4

import torch.distributed as dist

from megacogvx.errors import LaunchError

INVITATION = "megacogvx/invitation"
POLL_SECONDS = 0.05
POLLS_PER_SECOND = 2000  # of all ranks together: a store that serves tens of thousands of requests isn't kept busy


def meet(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """Return a name that the ranks of this attempt share, and none of an earlier one does; every rank calls it.

    Args:
        store: shared by the ranks, and perhaps by those of earlier attempts.
        rank, world_size: this rank's place.
        timeout: how long the ranks wait for each other.

    Raises:
        LaunchError: not all came in that time; the first rank names those that are missing.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    pause = max(POLL_SECONDS, world_size / POLLS_PER_SECOND)
    return _invite(store, world_size, deadline) if rank == 0 else _answer(store, rank, deadline, pause)


def _invite(store: dist.Store, world_size: int, deadline: float) -> str:
    name, missing = uuid4().hex, set(range(1, world_size))
    store.set(INVITATION, name)
    answers: dict[str, str] = {}
    while missing:
        for rank in [rank for rank in sorted(missing) if store.check([_key(name, rank)])]:
            answers[str(rank)] = store.get(_key(name, rank)).decode()
            missing.remove(rank)
        if missing and time.monotonic() > deadline:
            raise LaunchError(
                f"rank(s) {_ranges(sorted(missing))} of {world_size} have not come in parallel.timeout_minutes; "
                "look whether they were started with the same MASTER_ADDR and MASTER_PORT, and what they say"
            )
        time.sleep(POLL_SECONDS if missing else 0)
    store.set(_key(name), json.dumps(answers))
    return name


def _answer(store: dist.Store, rank: int, deadline: float, pause: float) -> str:
    own, answered = uuid4().hex, None
    while time.monotonic() < deadline:
        if store.check([INVITATION]):
            name = store.get(INVITATION).decode()
            if name != answered:
                store.set(_key(name, rank), own)
                answered = name
            # An invitation of an earlier attempt has been accepted by the rank that was this one then.
            if store.check([_key(name)]) and json.loads(store.get(_key(name))).get(str(rank)) == own:
                return name
        time.sleep(pause)
    raise LaunchError(f"rank {rank} was not counted in by rank 0 in time; look what rank 0 says")


def _key(name: str, rank: int | None = None) -> str:
    return f"megacogvx/{name}/{'all' if rank is None else rank}"


def _ranges(ranks: list[int]) -> str:
    """Return "1, 8-15" for 1, 8, 9, ..., 15."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
