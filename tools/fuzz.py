#!/usr/bin/env python
"""Fuzz every parser of outside bytes in the data room; kill a dataset's writer, and fill its disk, at random moments.

python tools/fuzz.py                                      2,000 mutations a parser, 200 kills, 200 full disks
python tools/fuzz.py --targets index --start 17 --count 1                  one mutation again
python tools/fuzz.py --targets megatron-peer-index megatron-peer-bin       Megatron-LM's own reader on its own files

Progress is kept in --state; the same command goes on where an interrupted one was. The exit status is 1 when a mutation
led to anything but a typed error that names the file, or an equal result. Megatron-LM's errors have many types, so each
counts as "other exception"; what tells there is "different result".
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megacogvx.data.indexed.durable import write_atomically
from megacogvx.log import progress
from megacogvx.testing.fuzz import fuzz
from megacogvx.testing.fuzz_targets import PEERS, targets
from megacogvx.testing.kill_writer import fill_and_resume, kill_and_resume

WRITERS = {"kill": kill_and_resume, "full-disk": fill_and_resume}
BATCH = 50  # mutations between two notes of progress


def main() -> int:
    """Run what is left, and print a table."""
    with tempfile.TemporaryDirectory() as folder:
        names = [*targets(Path(folder)), *WRITERS]
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        ours = [name for name in names if name not in PEERS]
        parser.add_argument("--targets", nargs="+", choices=names, default=ours)
        parser.add_argument(
            "--count", type=int, default=2000, help="mutations of each parser; a tenth of it kills and full disks"
        )
        parser.add_argument("--start", type=int, default=0, help="first seed")
        parser.add_argument("--state", type=Path, default=Path("fuzz.json"), help="progress (default fuzz.json)")
        arguments = parser.parse_args()
        state = json.loads(arguments.state.read_text()) if arguments.state.is_file() else {}
        for name in arguments.targets:
            count = max(1, arguments.count // 10) if name in WRITERS else arguments.count
            run(name, Path(folder), range(arguments.start, arguments.start + count), state, arguments.state)
    return report(state, arguments.targets)


def run(name: str, folder: Path, seeds: range, state: dict, path: Path) -> None:
    """Run the seeds of one target that are still to be done."""
    key = f"{name} {seeds.start}-{seeds.stop}"
    entry = state.setdefault(key, {"next": seeds.start, "outcomes": {}, "findings": []})
    target = None if name in WRITERS else targets(folder)[name]()
    for start in progress(range(entry["next"], seeds.stop, BATCH), key):
        part = range(start, min(start + BATCH, seeds.stop))
        if target is None:
            outcomes, findings = Counter[str](), []
            for seed in part:
                problem = WRITERS[name](folder / f"{name}-{seed}", seed)
                outcomes[problem or "nothing lost"] += 1
                findings += [(seed, problem, "")] if problem else []
        else:
            result = fuzz(target.path, target.parse, part, mutation=target.mutation, slack=target.slack)
            outcomes, findings = result.outcomes, result.findings
        entry["outcomes"] = dict(Counter(entry["outcomes"]) + outcomes)
        entry["findings"] += findings
        entry["next"] = part.stop
        write_atomically(path, json.dumps(state).encode())


def report(state: dict, names: list[str]) -> int:
    """Print how many of how many ended how; return the exit status."""
    table = Table(title="Mutations")
    for column in ("target and seeds", "done", "outcomes", "findings"):
        table.add_column(column, overflow="fold")
    shown = {key: entry for key, entry in state.items() if key.split()[0] in names}
    for key, entry in shown.items():
        outcomes = ", ".join(f"{count} {name}" for name, count in sorted(entry["outcomes"].items()))
        found = "\n".join(f"seed {seed}: {kind}: {_last_line(detail)}" for seed, kind, detail in entry["findings"][:5])
        table.add_row(key, str(sum(entry["outcomes"].values())), outcomes, found or "none")
    Console().print(table)
    return int(any(entry["findings"] for entry in shown.values()))


def _last_line(detail: str) -> str:
    return (detail.strip().splitlines() or [""])[-1][:160]


if __name__ == "__main__":
    sys.exit(main())
