"""What was measured: a file of results, written after every case, and the table that kernels/README.md shows of it."""

from __future__ import annotations

import json
import os
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
PROJECT = FOLDER.parents[1]
RESULTS = FOLDER / "results"
README = PROJECT / "kernels" / "README.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
COLUMNS = ("op", "size", "ms", "share of copy bandwidth", "eager ms", "torch.compile ms", "remarks")
GOAL = 0.85  # of the copy bandwidth; the remarks on a share below it give the profile's reason
Results = dict[str, Any]


def circumstances(sources: str) -> Results:
    """Return what a measurement depends on, with no rows yet: card, driver, torch, commit and sources."""
    import torch

    on_gpu = torch.cuda.is_available()
    return {
        "date": date.today().isoformat(),
        "card": torch.cuda.get_device_name(0) if on_gpu else "CPU",
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "torch": torch.__version__,
        "commit": _said("git", "-C", str(PROJECT), "rev-parse", "--short", "HEAD"),
        "sources": sources,
        "bandwidth": 0.0,
        "rows": {},
        "done": {},
        "said": [],
    }


def _said(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def resume(fresh: Results, folders: list[Path]) -> Results:
    """Return the newest results of the same card, torch and sources, else `fresh`."""
    files = [file for folder in folders for file in folder.glob("*.json")]
    for file in sorted(files, key=lambda file: file.name, reverse=True):
        kept: Results = json.loads(file.read_text())
        if all(kept.get(key) == fresh[key] for key in ("card", "torch", "sources")):
            return kept
    return fresh


def save(results: Results, folder: Path) -> Path:
    """Write the results as they are so far; a reader never finds half of them."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{results['date']}_{results['card'].replace(' ', '_')}_{results['sources']}.json"
    file.with_suffix(".tmp").write_text(json.dumps(results, indent=1) + "\n")
    os.replace(file.with_suffix(".tmp"), file)
    return file


def latest() -> Results | None:
    """Return the newest results in the project, or None."""
    files = sorted(RESULTS.glob("*.json"))
    return json.loads(files[-1].read_text()) if files else None


def merge(results: Results, found: dict[str, Results], size: str) -> None:
    """Add what a case found, op -> figures, to the rows of one size; figures of an earlier case stay."""
    for op, figures in found.items():
        row = results["rows"].setdefault(f"{op}: {size}", {})
        notes = {**row.get("notes", {}), **figures.get("notes", {})}
        row.update(figures)
        if notes:
            row["notes"] = notes


def table(results: Results | None, rows: list[tuple[str, str]]) -> str:
    """Return the Markdown of what was measured; without results, every row says so."""
    measured = results["rows"] if results else {}
    lines = [_headline(results), "", f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for op, size in rows:
        lines.append(f"| {op} | {size} | {' | '.join(_cells(measured.get(f'{op}: {size}')))} |")
    if results:
        lines += ["", *(f"- {sentence}" for sentence in [*_checks(results), *results["said"]])]
    return "\n".join(lines)


def write_table(results: Results | None, rows: list[tuple[str, str]]) -> None:
    """Put the table between its two marks in kernels/README.md."""
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n{table(results, rows)}\n{END}{after}")


def _headline(results: Results | None) -> str:
    if results is None:
        return "Not measured yet: `python kernels/benchmarks/run_all.py` on a machine with a GPU fills this table."
    where = f"{results['card']}, driver {results['driver']}, torch {results['torch']}, commit {results['commit']}"
    speed = f"{results['bandwidth'] / 1e12:.2f} TB/s" if results["bandwidth"] else "an unknown number of bytes"
    return f"{results['date']}: {where}; a copy within its memory moves {speed}."


def _checks(results: Results) -> list[str]:
    """Say of every check whether it held; one that wasn't reached isn't mentioned as if it had."""
    done = {name: how for name, how in results["done"].items() if name.startswith("check")}
    return [f"{name}: {how.get('error') or 'held'}." for name, how in done.items()]


def _cells(found: Results | None) -> list[str]:
    if not found:
        return ["not measured", "", "", "", ""]
    share = f"{found['share']:.0%}" if found.get("share") else ""
    times = [f"{found[key]:.3f}" if key in found else "" for key in ("ms", "eager", "compiled")]
    return [times[0] or "not measured", share, times[1], times[2], "; ".join(_remarks(found))]


def _remarks(found: Results) -> list[str]:
    said = [found["remark"]] if "remark" in found else []
    if "tflops" in found:
        said.append(f"{found['tflops']:.0f} TFLOP/s")
    if 0 < found.get("share", 0) < GOAL:
        said.append(found.get("reason", "reason not yet profiled"))
    names = {"ms": "", "eager": "eager: ", "compiled": "torch.compile: "}
    return said + [names.get(name, f"{name}: ") + note for name, note in found.get("notes", {}).items()]
