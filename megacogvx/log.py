"""Rank-aware logging and progress: rank 0 speaks, the others only warn.

`parallel/groups.py` tells this module the rank's coordinates once the process groups exist; until then a process
speaks as rank 0.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

Item = TypeVar("Item")
PLAIN_LINE_SECONDS = 10.0  # between two progress lines when the output is a file

_root = logging.getLogger("megacogvx")
_rank = 0
_coordinates = ""


class _Format(logging.Formatter):
    """`12:30:59 [dp0 cp0 tp1] WARNING text`; the level is left out for INFO."""

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname} "
        where = f"[{_coordinates}] " if _coordinates and (_rank or record.levelno > logging.INFO) else ""
        return f"{self.formatTime(record, '%H:%M:%S')} {where}{level}{super().format(record)}"


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to whatever sys.stderr is now, not to what it was when the first logger was made."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def get_logger(name: str) -> logging.Logger:
    """Return the logger of module `name`; INFO reaches the terminal on rank 0 only."""
    if not _root.handlers:
        handler = _Stderr()
        handler.setFormatter(_Format("%(message)s"))
        _root.addHandler(handler)
        _root.setLevel(logging.INFO)
        _root.propagate = False
    return logging.getLogger(name if name.startswith("megacogvx") else f"megacogvx.{name}")


def set_rank(rank: int, coordinates: str = "") -> None:
    """Tell the logger which rank this is (`coordinates`: "dp0 pp0 cp1 tp0"); other ranks than 0 only warn."""
    global _rank, _coordinates
    _rank, _coordinates = rank, coordinates
    get_logger("megacogvx").setLevel(logging.INFO if rank == 0 else logging.WARNING)


def progress(items: Iterable[Item], label: str, total: int | None = None, *, plain: bool = True) -> Iterator[Item]:
    """Yield `items`, with a bar and the time left on a terminal, or a plain line every ten seconds in a file.

    Args:
        items: what to iterate over.
        label: what is being done, e.g. "encode".
        total: number of items; taken from `len(items)` when it has one.
        plain: write those lines in a file; a training has better ones.
    """
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    if _rank != 0:
        yield from items
    elif sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeElapsedColumn(),
                   TextColumn("left"), TimeRemainingColumn())  # fmt: skip
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(label, total=total)
            for item in items:
                yield item
                bar.advance(task)
    elif not plain:
        yield from items
    else:
        yield from _plain_progress(items, label, total)


class _Rate(ProgressColumn):
    """Items a second."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.3g} a second")


def _plain_progress(items: Iterable[Item], label: str, total: int | None) -> Iterator[Item]:
    logger, start = get_logger("megacogvx.progress"), time.monotonic()
    last = start
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= PLAIN_LINE_SECONDS:
            last = now
            seconds = (now - start) / done
            left = f", {seconds * (total - done):.0f} s left" if total else ""
            logger.info(
                "%s: %d of %s, %.3g a second%s", label, done, total if total is not None else "?", 1 / seconds, left
            )
