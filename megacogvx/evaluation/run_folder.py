"""What runs and commands leave behind, as the report reads it: what is missing or broken is noted, never an error."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacogvx.log import get_logger

logger = get_logger(__name__)
Row = dict[str, Any]


@dataclass(frozen=True)
class RunFolder:
    """What a run left behind.

    Attributes:
        folder: the run folder.
        rows: of metrics.jsonl, by step; empty if there is none.
        config: the text of config.yaml; None if there is none.
        problems: what is missing or could not be read.
    """

    folder: Path
    rows: list[Row]
    config: str | None
    problems: list[str]

    @classmethod
    def read(cls, folder: Path) -> RunFolder:
        """Read `folder`; what isn't there is a problem, not an error."""
        problems: list[str] = []
        rows = read_metrics(folder / "metrics.jsonl", problems)
        config = folder / "config.yaml"
        if not config.is_file():
            problems.append(f"{config} (no resolved config)")
        for problem in problems:
            logger.warning("report: missing %s", problem)
        return cls(folder, rows, config.read_text() if config.is_file() else None, problems)

    @property
    def steps(self) -> list[int]:
        """The steps of the rows."""
        return [row["step"] for row in self.rows]

    def column(self, name: str) -> list[float | None]:
        """One number per row, None where the row has none or it isn't finite."""
        return [number(row.get(name)) for row in self.rows]

    def values(self, name: str) -> list[float]:
        """The numbers that are there."""
        return [value for value in self.column(name) if value is not None]

    @property
    def layouts(self) -> list[tuple[int, str]]:
        """(first step, layout) of every stretch of steps on one layout."""
        found: list[tuple[int, str]] = []
        for row in self.rows:
            if row.get("layout") and (not found or found[-1][1] != row["layout"]):
                found.append((row["step"], row["layout"]))
        return found

    def total(self, name: str) -> str:
        """The sum of a column as text."""
        values = self.values(name)
        return f"{round(sum(values)):,}" if values else "an unknown number of"


def read_metrics(path: Path, problems: list[str]) -> list[Row]:
    """Read metrics.jsonl, ordered by step, the last row of a step winning; broken lines are counted as a problem."""
    if not path.is_file():
        problems.append(f"{path} (no curves)")
        return []
    rows, broken = {}, 0
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
            rows[int(row["step"])] = row
        except (ValueError, KeyError, TypeError):
            broken += 1
    if broken:
        problems.append(f"{broken} line(s) of {path}, which can't be read (cut off by an interruption?)")
    return [rows[step] for step in sorted(rows)]


@dataclass(frozen=True)
class Sample:
    """One generated video and the facts beside it (empty if its JSON is missing)."""

    path: Path
    facts: Row


def read_samples(folder: Path) -> list[Sample]:
    """Find the videos of `folder` and the JSON beside each."""
    return [Sample(path, _read_json(path.with_suffix(".json"))) for path in sorted(folder.glob("*.mp4"))]


def read_steps(path: Path) -> dict[str, Row]:
    """Read the commands that were run: name -> {"seconds", "command"}; those without seconds are left out."""
    steps = _read_json(path)
    return {name: step for name, step in steps.items() if isinstance(step, dict) and number(step.get("seconds"))}


def _read_json(path: Path) -> Row:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def number(value: object) -> float | None:
    """Return `value` as a number; None if it is none, or not finite."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
