"""The fault matrix: every fault planted in real processes, then recovered, and held to the run that met none.

    python tests/faults/matrix.py                     all rows; goes on where it was stopped
    python tests/faults/matrix.py --rows 1 8          some rows
    python tests/faults/matrix.py --minutes 5         no new case after five minutes

Each case appends a row to FOLDER/results.jsonl; the table at the end is made of that file alone. "Identical": weights,
moments, state, loss history and consumed samples equal the uninterrupted run's byte for byte.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
import traceback
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matrix_datasets
import matrix_files
import matrix_ranks
from matrix_cases import Case, Outcome, Session, code

TITLES = {
    1: "kill -9 of a rank", 2: "kill -9 during a save", 3: "damaged checkpoint", 4: "damaged dataset",
    5: "kill -9 of a dataset writer", 6: "disk full", 7: "NaN, Inf, spike", 8: "stuck rank", 9: "slow rank",
    10: "other layout on resume", 11: "SIGTERM, SIGUSR1", 12: "changed dataset", 13: "loader dies",
    14: "clock, folders, EIO",
}  # fmt: skip
LONG = ("dp4", "tp2cp2", "torchrun")  # in the names of cases with four processes or a launcher


def cases() -> list[Case]:
    """Return all cases of all rows."""
    rows = (*matrix_ranks.ROWS, *matrix_files.ROWS, *matrix_datasets.ROWS)
    found = [case for row in rows for case in row()]
    # The first of each row, the second of each, ..., the long ones last: a call that is stopped early has seen
    # something of every row.
    places = Counter[int]()
    order = {}
    for case in found:
        order[case.row, case.name] = (any(word in case.name for word in LONG), places[case.row], case.row)
        places[case.row] += 1
    assert len(order) == len(found), "two cases of the same name"
    return sorted(found, key=lambda case: order[case.row, case.name])


def table(results: list[dict[str, Any]]) -> str:
    """Return the results as a table, one line a row of the matrix, with the sum."""
    columns = ("injected", "recovered", "lost", "repeated", "silent")
    head = f"{'row':>3}  {'fault':<28}{'cases':>7}{'failed':>8}" + "".join(f"{name:>11}" for name in columns)
    lines = [head + f"{'identical':>13}"]
    for row in [*sorted({result["row"] for result in results}), None]:
        mine = [result for result in results if row in (None, result["row"])]
        sums = {name: sum(result["outcome"][name] for result in mine) for name in (*columns, "identical", "compared")}
        failed = sum(bool(result["error"]) for result in mine)
        title = f"{row:>3}  {TITLES[row]:<28}" if row else f"{'':>3}  {'all':<28}"
        numbers = "".join(f"{sums[name]:>11,}" for name in columns)
        same = f"{sums['identical']} of {sums['compared']}"
        lines.append(f"{title}{len(mine):>7}{failed:>8}{numbers}{same:>13}")
    return "\n".join(lines)


def main() -> int:
    """Run what is left of the matrix, print the table; status 0 if everything asked for has run and recovered."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/faults"))
    parser.add_argument("--rows", type=int, nargs="*", help="only these rows of the table")
    parser.add_argument("--minutes", type=float, default=60.0, help="no new case after so long")
    parser.add_argument("--again", action="store_true", help="drop the results of these rows first")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    file = arguments.folder.resolve() / "results.jsonl"
    results = _results_that_count(file)
    if arguments.again:
        results = [result for result in results if arguments.rows and result["row"] not in arguments.rows]
    file.write_text("".join(json.dumps(result) + "\n" for result in results))
    wanted = [case for case in cases() if not arguments.rows or case.row in arguments.rows]
    done = {(result["row"], result["name"]) for result in results}
    left = [case for case in wanted if (case.row, case.name) not in done]
    end, session = time.monotonic() + arguments.minutes * 60, None
    while left and time.monotonic() < end:
        session = session or Session(file.parent)
        results.append(_run(left.pop(0), session))
        with file.open("a") as out:
            out.write(json.dumps(results[-1]) + "\n")
    print(table(results))
    bad = sum(bool(result["error"]) for result in results)
    print(f"{len(left)} cases are left" if left else "every case has run", f"; {bad} failed" if bad else "", sep="")
    return int(bool(left or bad))


def _results_that_count(file: Path) -> list[dict[str, Any]]:
    """Return what this very code has recovered: what failed is tried again, and so is what other code has done."""
    results = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [result for result in results if not result["error"] and result["code"] == code()]


def _run(case: Case, session: Session) -> dict[str, Any]:
    folder, began, error = session.folder / "case", time.monotonic(), ""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    outcome = Outcome(recovered=0)
    try:
        outcome = case.run(session, folder)
        if outcome.silent or outcome.lost or outcome.repeated or outcome.identical < outcome.compared:
            error = outcome.note or "not recovered"
    except BaseException as caught:  # torch's CheckpointException is no Exception
        if isinstance(caught, KeyboardInterrupt):
            raise
        error = traceback.format_exc()
    seconds = time.monotonic() - began
    print(
        f"{case.row:>3}  {case.name:<44} {seconds:6.1f} s  {'FAILED: ' + error if error else outcome.note}", flush=True
    )
    return {
        "row": case.row,
        "name": case.name,
        "code": code(),
        "seconds": seconds,
        "error": error,
        "outcome": asdict(outcome),
    }


if __name__ == "__main__":
    sys.exit(main())
