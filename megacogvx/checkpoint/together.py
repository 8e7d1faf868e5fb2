"""What the ranks do together around files: an error of one is an error of all, and each checks a share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from torch.distributed.checkpoint.api import CheckpointException

from megacogvx.checkpoint import manifest
from megacogvx.errors import CheckpointError
from megacogvx.log import get_logger
from megacogvx.parallel.groups import ParallelGroups, gather_json

Result = TypeVar("Result")
logger = get_logger(__name__)


def together(groups: ParallelGroups, act: Callable[[], Result]) -> Result:
    """Return `act()`; if it fails on any rank, raise `CheckpointError` with the first such rank's message on all."""
    result, problem = None, None
    try:
        result = act()
    except CheckpointError as error:
        problem = str(error)
    except (Exception, CheckpointException) as error:  # torch's own is a BaseException
        logger.debug("checkpoint", exc_info=True)
        problem = f"{type(error).__name__}: {error}"
    problems = [text for text in gather_json(problem, groups) if text]
    if problems:
        raise CheckpointError(problems[0])
    return result  # type: ignore[return-value]


def verify_together(path: Path, groups: ParallelGroups) -> list[str]:
    """Check all files of a checkpoint against its manifest, each rank a share; return what is wrong, on every rank."""
    try:
        _, entries = together(groups, lambda: manifest.read_manifest(path))
    except CheckpointError as error:
        return [str(error)]
    if groups.is_first:
        logger.info("checking %s: %d files", path, len(entries))
    mine = manifest.damaged_files(path, entries, share(sorted(entries), groups))
    if groups.is_first:
        mine = manifest.foreign_files(path, entries) + mine
    return [problem for problems in gather_json(mine, groups) for problem in problems]


def share(names: list[str], groups: ParallelGroups) -> list[str]:
    """Return this rank's share of the files, to hash and sync."""
    return names[groups.rank :: groups.world_size]
