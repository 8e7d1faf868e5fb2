"""What one sees of a run: a row of metrics.jsonl for each step, and a line of the log now and then.

The file holds each step once: a resumed run drops the rows of steps that it does again.
"""

from __future__ import annotations

import json
import math
import os
import re
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megacogvx.checkpoint.directory import write_durably
from megacogvx.errors import DataError
from megacogvx.log import get_logger
from megacogvx.parallel.groups import ParallelGroups

logger = get_logger(__name__)


class MetricsFile:
    """RUN/metrics.jsonl, or another file of one row a step, written by rank 0 only.

    Args:
        folder: the run folder.
        first_step: rows of this step and later ones are dropped; they are about to be written again.
        writes: whether this rank is the one that writes.
        name: of the file.
    """

    def __init__(self, folder: Path, first_step: int, writes: bool, name: str = "metrics.jsonl"):
        self.folder, self.path, self.writes = folder, folder / name, writes
        if writes and self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step_of(line) < first_step]
            write_durably(self.path, "".join(line + "\n" for line in kept))

    def add(self, row: dict[str, Any]) -> None:
        """Append one row; it must have a `step`. Numbers that are not finite become text, which every reader takes.

        Raises:
            DataError: the file can't be written; a run without its history is not gone on with.
        """
        if not self.writes:
            return
        line = json.dumps(_finite(row), allow_nan=False) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(line)
        except OSError as error:
            raise DataError(
                f"{self.path} can't take a row of {len(line)} bytes: {error}; make room, then go on"
            ) from None

    def sync(self) -> None:
        """Bring the rows to disk: before a checkpoint counts, since a resumed run doesn't do its steps again."""
        if self.writes and self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())


NOT_SHOWN = ("step", "samples", "tokens", "flops", "layout")  # in a line of the log; the rates tell it

# Dense bf16 FLOP/s of one GPU, from NVIDIA's data sheets; the first name that the device's contains, as words, counts.
PEAK_FLOPS = {
    "GB200": 2.5e15, "B200": 2.25e15, "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12,
    "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L40": 181e12, "A40": 150e12,
}  # fmt: skip


def peak_flops(device: torch.device) -> float | None:
    """Return the dense bf16 FLOP/s of a GPU of `PEAK_FLOPS`, else None."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_FLOPS.items() if re.search(rf"\b{known}\b", name)), None)


class Meter:
    """Speed, memory and time left, step by step.

    Args:
        steps: still to do.
        groups: how many ranks there are, on which device.
        clock: seconds.
    """

    def __init__(self, steps: int, groups: ParallelGroups, clock: Callable[[], float] = time.perf_counter) -> None:
        self._steps_left, self._steps_done, self._clock = steps, 0, clock
        self._ranks, self._device, self._peak = groups.world_size, groups.device, peak_flops(groups.device)
        self._began = self._last = self._asked = clock()
        self.data_wait = 0.0

    def wait_for_data(self) -> None:
        """The data of a step is asked for; a checkpoint may have been begun since the last one ended."""
        self._asked = self._clock()

    def start_step(self) -> None:
        """The data is there, on all ranks."""
        self.data_wait = self._clock() - self._asked

    def end_step(self, facts: dict[str, Any]) -> dict[str, float]:
        """Return the step's numbers: seconds, rates by what `facts` counts, memory in GB.

        `tflops` is of one rank; `mfu` its share of the device's peak. `facts["flops"]` are those that the model asks
        for, attention by the sum of squared lengths, without recomputation and padding.
        """
        now = self._clock()
        seconds = max(now - self._last, 1e-9)
        self._last, self._steps_done, self._steps_left = now, self._steps_done + 1, self._steps_left - 1
        row = {
            "seconds": round(seconds, 4),
            "data_wait": round(self.data_wait, 4),
            "memory_gb": round(self._memory(), 3),
        }
        for name in ("samples", "tokens"):
            if name in facts:
                row[f"{name}_per_second"] = round(facts[name] / seconds, 3)
        if "flops" in facts:
            speed = facts["flops"] / seconds / self._ranks
            row["tflops"] = float(f"{speed / 1e12:.5g}")
            if self._peak is not None:
                row["mfu"] = round(speed / self._peak, 4)
        return row

    def seconds_left(self) -> float:
        """Return the seconds to the last step, at the mean speed so far."""
        return (self._last - self._began) / max(1, self._steps_done) * self._steps_left

    def _memory(self) -> float:
        """Return the most that this rank has used, in GB: of the GPU, else of the process."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def log_line(row: dict[str, Any], steps: int, seconds_left: float) -> None:
    """Write the numbers of `row` as one line: `step 20/150  loss 0.912  ...  12 s left`."""
    numbers = [f"{name} {_short(value)}" for name, value in row.items() if name not in NOT_SHOWN and _short(value)]
    logger.info("step %d/%d  %s  %s left", row["step"] + 1, steps, "  ".join(numbers), _duration(seconds_left))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _step_of(line: str) -> float:
    """Return the row's step; a line cut off by a crash counts as later than any."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value) if isinstance(value, int | str) else ""


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
