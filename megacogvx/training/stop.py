"""SIGTERM and SIGUSR1 end a run in order: the step is finished, one checkpoint written, and the program ends with 75.

75 is the EX_TEMPFAIL of sysexits.h: not finished, start again to go on. Slurm sends SIGUSR1 before the time limit
(`--signal=USR1@600`) and SIGTERM on preemption; Kubernetes and torchrun send SIGTERM.
"""

from __future__ import annotations

import signal
from types import FrameType

from megacogvx.log import get_logger
from megacogvx.parallel.groups import ParallelGroups, any_rank

STOPPED_STATUS = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

logger = get_logger(__name__)


class StopSignal:
    """Remembers that a signal came; `install` makes the handlers. Further signals change nothing."""

    def __init__(self) -> None:
        self.received: str | None = None

    def install(self) -> StopSignal:
        """Handle the signals from now on; the main thread calls it."""
        for number in SIGNALS:
            signal.signal(number, self._receive)
        return self

    def agreed(self, groups: ParallelGroups) -> bool:
        """Return whether any rank was signalled; every rank calls it once a step and gets the same answer."""
        return any_rank(self.received is not None, groups)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        first = self.received is None
        self.received = signal.Signals(number).name
        if first:
            logger.warning("%s: stopping after this step, with a checkpoint", self.received)
