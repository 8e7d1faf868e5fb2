"""A window of steps under torch's profiler, written as a trace of each chosen rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, schedule

from megacogvx.log import get_logger
from megacogvx.parallel.groups import ParallelGroups
from megacogvx.training.tracking import TrackingConfig

logger = get_logger(__name__)


class _NoProfiler:
    def step(self) -> None:
        """There is no window."""


@contextlib.contextmanager
def profile_window(config: TrackingConfig, folder: Path, groups: ParallelGroups) -> Iterator[Any]:
    """Give an object whose `step()` is called after each step.

    Args:
        config: `tracking.profile_from`, counted from where this start of the run begins, and the other two.
        folder: the run folder; the trace is profile/rank-N.json.
        groups: which rank this is, on which device.
    """
    if config.profile_from is None or groups.rank not in config.profile_ranks:
        yield _NoProfiler()
        return
    file = folder / "profile" / f"rank-{groups.rank}.json"

    def write(finished: Any) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(file))
        logger.info("profiled %d steps: %s", config.profile_steps, file)

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if groups.device.type == "cuda" else [])]
    window = schedule(wait=config.profile_from, warmup=0, active=config.profile_steps, repeat=1)
    with profile(
        activities=kinds, schedule=window, on_trace_ready=write, profile_memory=True, record_shapes=True
    ) as profiler:
        yield profiler
