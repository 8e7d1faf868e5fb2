"""The run's saves: in the background, one at a time, with old checkpoints deleted and failures counted."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from torch import nn

from megacogvx.checkpoint.config import CheckpointConfig
from megacogvx.checkpoint.directory import CheckpointDirectory
from megacogvx.checkpoint.distributed import PendingSave, start_save
from megacogvx.checkpoint.run_state import Kept
from megacogvx.checkpoint.writing import SavePlans
from megacogvx.errors import AgreedError, CheckpointError
from megacogvx.log import get_logger
from megacogvx.parallel.groups import ParallelGroups
from megacogvx.parallel.optimizer import Optimizer

logger = get_logger(__name__)


class Saver:
    """Saves while the training goes on. Every rank calls each method, at the same steps.

    Args:
        directory: the run's checkpoints.
        config: section `checkpoint`.
        groups: process groups.
    """

    def __init__(self, directory: CheckpointDirectory, config: CheckpointConfig, groups: ParallelGroups) -> None:
        self.directory, self.config, self.groups = directory, config, groups
        self._pending: PendingSave | None = None
        self._failed = 0  # saves in a row
        self._plans = SavePlans()

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Complete the pending save of a run that ends on all ranks at once; one that broke leaves it to the next."""
        if isinstance(error, AgreedError):
            try:
                self.finish()
            except CheckpointError as problem:
                logger.error("%s", problem)

    def save(
        self, step: int, model: nn.Module, optimizer: Optimizer, extra: Mapping[str, Any], texts: Mapping[str, str],
        beside: Mapping[str, Kept],
    ) -> None:  # fmt: skip
        """Begin the checkpoint of `step`, after the one before is complete; arguments as for `start_save`.

        Raises:
            CheckpointError: more saves in a row failed than `checkpoint.failed_saves`.
        """
        self.finish()
        try:
            self._pending = start_save(
                self.directory, step, model, optimizer, extra, self.groups,
                texts=texts, beside=beside, background=self.config.background, plans=self._plans,
            )  # fmt: skip
        except CheckpointError as error:
            self._count_failure(step, error)

    def poll(self) -> None:
        """Complete the pending save if all ranks have written their files."""
        if self._pending is not None and self._pending.is_done():
            self.finish()

    def finish(self) -> None:
        """Wait for the pending save, if there is one, and complete it.

        Raises:
            CheckpointError: more saves in a row failed than `checkpoint.failed_saves`.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.finish()
            self._failed = 0
        except CheckpointError as error:
            self._count_failure(pending.step, error)
            return
        if self.groups.is_first:
            self._prune(pending.step)

    def close(self) -> None:
        """Complete the pending save; the run ends with it.

        Raises:
            CheckpointError: the run's last save failed: there is no checkpoint of its last step.
        """
        self.finish()
        if self._failed:
            raise CheckpointError(
                f"the last save of the run failed (see the log above); the newest checkpoint in "
                f"{self.directory.folder} is an earlier one. Make room and start the run again: it goes on from there"
            )

    def _prune(self, newest: int) -> None:
        """Delete old checkpoints; rank 0. One that can't be deleted stays: the other ranks know nothing of it."""
        try:
            gone = self.directory.prune(newest, self.config.keep_last, self.config.keep_every)
        except OSError as error:
            logger.warning("an old checkpoint could not be deleted: %s", error)
            return
        if gone:
            logger.info("deleted the checkpoints of steps %s", ", ".join(map(str, gone)))

    def _count_failure(self, step: int, error: CheckpointError) -> None:
        self._failed += 1
        if self._failed > self.config.failed_saves:
            raise CheckpointError(
                f"{self._failed} saves in a row failed, checkpoint.failed_saves={self.config.failed_saves} allowed; "
                f"the last one: {error}"
            )
        if self.groups.is_first:
            logger.error("the checkpoint of step %d failed, the training goes on: %s", step, error)
