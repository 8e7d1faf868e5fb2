"""What one sees of a run: a row of metrics.jsonl for each step, and a line of the log now and then.

The file holds each step once: a resumed run drops the rows of steps that it does again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megacogvx.log import get_logger

logger = get_logger(__name__)


class MetricsFile:
    """RUN/metrics.jsonl, written by rank 0 only.

    Args:
        folder: the run folder.
        first_step: rows of this step and later ones are dropped; they are about to be written again.
        writes: whether this rank is the one that writes.
    """

    def __init__(self, folder: Path, first_step: int, writes: bool):
        self.folder, self.path, self.writes = folder, folder / "metrics.jsonl", writes
        if writes and self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step_of(line) < first_step]
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(line + "\n" for line in kept))
            temporary.replace(self.path)

    def add(self, row: dict[str, Any]) -> None:
        """Append one row; it must have a `step`."""
        if self.writes:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")


def log_line(row: dict[str, Any], steps: int, seconds_left: float) -> None:
    """Write the numbers of `row` as one line: `step 20/150  loss 0.912  ...  12 s left`."""
    numbers = [f"{name} {_short(value)}" for name, value in row.items() if name != "step" and _short(value)]
    logger.info("step %d/%d  %s  %s left", row["step"] + 1, steps, "  ".join(numbers), _duration(seconds_left))


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
