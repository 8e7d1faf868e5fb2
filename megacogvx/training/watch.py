"""Finds a stuck rank: one that is longer than the limit in one part of a step.

Each rank has a thread that looks once in a while how long the rank has been where it is, and tells the others by a
small file in RUN/ranks/. At the limit it writes all stacks of its process to RUN/stuck/, names the ranks that are
behind or silent, and ends the process with status 76; the other ranks' threads see RUN/stuck/ and do the same. A
rank whose thread can't run any more (something keeps Python's lock) is ended by faulthandler's own timer, which needs
no lock; one that is stopped altogether is silent, and is named by the others. Clocks of different machines are never
compared, and a clock that is set changes nothing.
"""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from megacogvx.log import get_logger

STUCK_STATUS = 76
PARTS = ("data", "step", "validation", "save")  # of a step, in order
LOOKS = 20  # looks within the limit
GRACE_SECONDS = 3.0  # until faulthandler ends a process whose thread can't

logger = get_logger(__name__)


class Watch:
    """Watches this rank while it is entered as a context.

    Args:
        folder: the run folder, which all ranks share.
        rank, world_size: among all processes.
        limit: seconds; None watches nothing.
        on_part: called when a part of a step begins, whether anything is watched or not.
        clock: seconds, of this process alone.
        pause: waits for so many seconds.
        end: ends the process with a status.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        world_size: int,
        limit: float | None,
        *,
        on_part: Callable[[], Any] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], Any] = time.sleep,
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self.folder, self.rank, self.world_size, self.limit = folder, rank, world_size, limit
        self._on_part, self._clock, self._pause, self._end = on_part, clock, pause, end
        self._step, self._part, self._since = 0, PARTS[0], clock()
        self._looks = 0
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    @staticmethod
    def clear(folder: Path) -> None:
        """Remove what an earlier start of the run left; one process, before any rank watches."""
        for name in ("ranks", "stuck"):
            shutil.rmtree(folder / name, ignore_errors=True)

    def __enter__(self) -> Watch:
        if self.limit is not None:
            (self.folder / "ranks").mkdir(parents=True, exist_ok=True)
            self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
            self._thread.start()
            self.at(self._step, self._part)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def at(self, step: int, part: str) -> None:
        """Say that this rank begins a part of a step, or goes on with a long one; the limit counts from here."""
        assert part in PARTS, part
        self._on_part()
        self._step, self._part, self._since = step, part, self._clock()
        if self._thread is not None and self.limit is not None:
            faulthandler.dump_traceback_later(self.limit + self._patience() + GRACE_SECONDS, exit=True)

    def look(self) -> None:
        """Tell the others where this rank is; end the process if it, or another one, is stuck."""
        assert self.limit is not None
        self._tell(ended=False)
        waited = self._clock() - self._since
        if waited > self.limit:
            self._give_up(f"{waited:.1f} s in {self._part} of step {self._step}")
        elif (self.folder / "stuck").is_dir():
            self._give_up("another rank is stuck")

    def _run(self) -> None:
        assert self.limit is not None
        while not self._done.wait(self.limit / LOOKS):
            try:
                self.look()
            except OSError as error:  # a full disk must not end a run
                logger.warning("the watch can't write to %s: %s", self.folder, error)

    def _give_up(self, why: str) -> None:
        folder = self.folder / "stuck"
        folder.mkdir(exist_ok=True)
        with (folder / f"rank-{self.rank}.txt").open("w") as file:
            file.write(f"rank {self.rank}: {why}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            self._tell(ended=True)
            behind = "; ".join(self._behind()) or "all ranks are in the same place"
            file.write(f"{behind}\n")
        logger.error("%s; %s; stacks in %s; ending with status %d", why, behind, folder, STUCK_STATUS)
        self._end(STUCK_STATUS)

    def _behind(self) -> list[str]:
        """Return a sentence for each rank that the others wait for: silent ones, else those least far."""
        before = self._rows()
        self._pause(self._patience())
        rows = self._rows()
        silent = [f"rank {rank} is silent" for rank in range(self.world_size) if rank not in rows]
        for rank, row in rows.items():
            if not row["ended"] and rank in before and row["looks"] == before[rank]["looks"]:
                silent.append(f"rank {rank} is silent since {row['part']} of step {row['step']}")
        places = {rank: (row["step"], PARTS.index(row["part"])) for rank, row in rows.items()}
        if silent or len(set(places.values())) == 1:
            return silent
        last = min(places.values())
        return [
            f"rank {rank} is in {PARTS[place[1]]} of step {place[0]}, behind the others"
            for rank, place in places.items()
            if place == last
        ]

    def _patience(self) -> float:
        """Return the seconds in which every rank that can will have looked again."""
        return 3 * (self.limit or 0.0) / LOOKS

    def _rows(self) -> dict[int, dict[str, Any]]:
        rows = {}
        for file in sorted((self.folder / "ranks").glob("*.json")):
            try:
                rows[int(file.stem)] = json.loads(file.read_text())
            except (OSError, ValueError):
                continue
        return rows

    def _tell(self, *, ended: bool) -> None:
        self._looks += 1
        row = {"step": self._step, "part": self._part, "looks": self._looks, "ended": ended}
        file = self.folder / "ranks" / f"{self.rank}.json"
        temporary = file.with_suffix(".writing")
        temporary.write_text(json.dumps(row))
        os.replace(temporary, file)
