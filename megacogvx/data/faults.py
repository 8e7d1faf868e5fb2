"""Samples that can't be read: told apart by reason, given up when a read hangs, counted; too many in a row end a run.

A damaged file and a stuck server end one sample, not the run. A worker that died, or a dataset that isn't the one that
was planned, ends the run: `LaunchError` and `DataError` of `loader.py` and `pack.py`.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import Any, TypeVar

from megacogvx.errors import AgreedError, DataError
from megacogvx.log import get_logger

T = TypeVar("T")
logger = get_logger(__name__)


class Fault(IntEnum):
    """Why a sample couldn't be read; ranks agree on the largest."""

    NONE = 0
    DAMAGED = 1  # missing bytes, or bytes that differ from their checksum
    STUCK = 2  # the read didn't come back in time


class SampleError(DataError):
    """One sample can't be read; the others can."""

    def __init__(self, fault: Fault, message: str) -> None:
        super().__init__(message)
        self.fault = fault


class GuardedReader:
    """Calls in a thread of its own, so that a call that hangs can be given up; a new thread takes the next ones."""

    def __init__(self, timeout: float) -> None:
        """Wait `timeout` seconds for each call."""
        self.timeout = timeout
        self._calls: queue.SimpleQueue[tuple[Callable[[], object], queue.SimpleQueue] | None] | None = None

    def __call__(self, function: Callable[[], T], what: str) -> T:
        """Return `function()`.

        Raises:
            SampleError: it raised a `DataError`, or it hangs; other errors come as they are.
        """
        if self._calls is None:
            self._calls = queue.SimpleQueue()
            self._thread = threading.Thread(target=_serve, args=(self._calls,), name="sample-reader", daemon=True)
            self._thread.start()
        answer: queue.SimpleQueue = queue.SimpleQueue()
        self._calls.put((function, answer))
        try:
            value, error = answer.get(timeout=self.timeout)
        except queue.Empty:
            self._calls.put(None)  # when the call comes back after all, its thread ends
            self._calls = None
            raise SampleError(Fault.STUCK, f"{what}: the read is stuck for {self.timeout:g} seconds") from None
        if isinstance(error, DataError):
            raise SampleError(Fault.DAMAGED, str(error)) from error
        if error is not None:
            raise error
        return value

    def close(self) -> None:
        """End the thread: one inside torch when the interpreter goes down would abort the process."""
        if self._calls is not None:
            self._calls.put(None)
            self._thread.join()
            self._calls = None


def _serve(calls: queue.SimpleQueue) -> None:
    while (call := calls.get()) is not None:
        function, answer = call
        try:
            answer.put((function(), None))
        except BaseException as error:  # whatever it is, the caller has to hear of it
            answer.put((None, error))


class FaultCounter:
    """Counts the bad samples of a run, by reason, and ends it when too many come in a row.

    Attributes:
        counts: bad samples so far, by reason.
        in_a_row: bad samples since the last good one, in the order of the plan.
    """

    def __init__(self, limit: int, state: Mapping[str, Any] | None = None) -> None:
        """End the run at `limit` bad samples in a row; `state`: from `state()` of an earlier start of the run."""
        state = state or {}
        self.limit, self.in_a_row = limit, int(state.get("in_a_row", 0))
        self.counts: Counter[str] = Counter(state.get("counts", {}))

    def state(self) -> dict[str, Any]:
        """Return what a resumed run goes on from, ready for JSON."""
        return {"counts": dict(self.counts), "in_a_row": self.in_a_row}

    def add(self, faults: Sequence[int], sample_ids: Sequence[int]) -> None:
        """Count the samples of a step.

        Args:
            faults: a `Fault` per sample, equal on all ranks.
            sample_ids: of the samples, in the order of the plan.

        Raises:
            AgreedError: `limit` samples in a row are bad.
        """
        for fault, sample_id in zip(faults, sample_ids, strict=True):
            self.in_a_row = self.in_a_row + 1 if fault else 0
            if not fault:
                continue
            reason = Fault(fault).name.lower()
            self.counts[reason] += 1
            logger.warning("sample %d is %s: its place holds zeros without loss", sample_id, reason)
            if self.in_a_row >= self.limit:
                raise AgreedError(
                    f"{self.in_a_row} samples in a row can't be read, the last one is {sample_id} ({reason}); bad "
                    f"samples so far: {dict(self.counts)}. Check the storage and `megacogvx data verify`; the limit is "
                    f"data.max_bad_in_a_row={self.limit}"
                )
