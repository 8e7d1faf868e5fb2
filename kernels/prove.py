"""Prove the kernels without a GPU, piece by piece: what `make kernels` runs after the build.

A piece is a process of a few minutes: the machine code of one architecture against budgets.json; the tests of
tests/kernels; some of the 2,000 random shapes; errors that are planted and have to be caught; some of the 200 shapes
under AddressSanitizer. What has passed is kept in
build/proof/ for the state of the sources that it is of, so a proof that was interrupted goes on where it was, and one
of changed sources begins again.

    python kernels/prove.py                  # all that has not passed yet
    python kernels/prove.py --minutes 3      # begin no further piece after 3 minutes
    python kernels/prove.py --list           # what has passed and what has not
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT / "kernels"))
import toolchain  # noqa: E402  (beside this file, not installed)

PROOF = PROJECT / "build" / "proof"
ABOUT_PROGRAMS = ("tests/kernels/test_benchmarks.py", "tests/kernels/test_prove.py")  # not about kernels
PLANTED = "tests/kernels/test_planted_errors.py"
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "1800", "-m", "not gpu"]
KERNELS = ["tests/kernels", *(f"--ignore={file}" for file in (*ABOUT_PROGRAMS, PLANTED))]
FIXED_CASES = "the_kernel_packs or start_anywhere or need_no_particular or several_blocks or text_is_bit_equal"
TAIL = 40  # lines of a failed piece's output that are shown


@dataclass(frozen=True)
class Piece:
    """One process of the proof; `environment` is added to ours."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def is_test(self) -> bool:
        """Whether pytest runs it, and its report tells what was counted."""
        return "pytest" in self.command


def pieces(shapes: int, sanitized: int, slice_of: int = 250) -> list[Piece]:
    """Return the pieces of a proof, in the order in which they run.

    Args:
        shapes: random cases of each op.
        sanitized: of them, cases under AddressSanitizer, which is many times slower.
        slice_of: cases of one piece; under AddressSanitizer a fifth of it.
    """
    code = [sys.executable, "kernels/machine_code.py", "--architectures"]
    found = [Piece(f"machine code of sm_{each}", [*code, str(each)]) for each in toolchain.ARCHITECTURES]
    found.append(Piece("tests", [*PYTEST, *KERNELS, "-k", "not random_shapes and not keeps_its_budget"]))
    for part in _slices(shapes, slice_of):
        found.append(Piece(f"shapes {part}", [*PYTEST, *KERNELS, "-k", "random_shapes"], _of_shapes(part)))
    found.append(Piece("planted errors", [*PYTEST, PLANTED]))
    checked = _sanitizer()
    found.append(Piece("AddressSanitizer, fixed cases", [*PYTEST, *KERNELS, "-s", "-k", FIXED_CASES], checked))
    for part in _slices(sanitized, slice_of // 5):
        chosen = [*PYTEST, *KERNELS, "-s", "-k", "the_kernels_equal_the_reference_on_random_shapes"]
        found.append(Piece(f"AddressSanitizer, shapes {part}", chosen, {**checked, **_of_shapes(part)}))
    return found


def _slices(count: int, size: int) -> Iterator[str]:
    return (f"{first}:{min(first + size, count)}" for first in range(0, count, size))


def _of_shapes(part: str) -> dict[str, str]:
    return {"MEGACOGVX_KERNELS_SHAPES": part}


def _sanitizer() -> dict[str, str]:
    """Return what lets Python load a library that is compiled with AddressSanitizer."""
    compiler = toolchain.find_compiler()
    assert compiler, "no C++ compiler"
    library = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    return {"LD_PRELOAD": library.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}


def state() -> str:
    """Return a hash of everything that a proof is of: sources, their Python, and what tests them."""
    digest = hashlib.sha256(toolchain.fingerprint().encode() + sys.version.encode())
    folders = ("kernels/megacogvx_kernels", "tests/kernels", "megacogvx/testing")
    files = [file for folder in folders for file in (PROJECT / folder).rglob("*.py")]
    files += [PROJECT / "kernels" / name for name in ("machine_code.py", "budgets.json")]
    for file in sorted(set(files) - {PROJECT / name for name in ABOUT_PROGRAMS}):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def run(piece: Piece, report: Path) -> dict[str, float] | None:
    """Run a piece.

    Returns:
        what it counted: passed, shapes and seconds; None if something failed or was skipped, which is printed.
    """
    began = time.monotonic()
    report.unlink(missing_ok=True)
    command = [*piece.command, f"--junit-xml={report}"] if piece.is_test else piece.command
    # Before any other import: the kernels' tests may not be skipped, and one thread computes.
    always = {"MEGACOGVX_KERNELS_MUST_RUN": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=PROJECT, env={**os.environ, **always, **piece.environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    counted = _counted(piece, done.stdout, report)
    if done.returncode or not counted["passed"] or counted["failed"] or counted["skipped"]:
        print(*done.stdout.splitlines()[-TAIL:], sep="\n")
        print(f"{piece.name}: exit status {done.returncode}, {dict(counted)}")
        return None
    return {"passed": counted["passed"], "shapes": counted["shapes"], "seconds": round(time.monotonic() - began, 1)}


def _counted(piece: Piece, output: str, report: Path) -> Counter[str]:
    if not piece.is_test:
        said = re.search(r"^(\d+) passed, (\d+) failed$", output, re.MULTILINE)
        return Counter({"passed": int(said[1]), "failed": int(said[2])} if said else {})
    counted: Counter[str] = Counter()
    for case in ET.parse(report).iter("testcase") if report.is_file() else ():
        outcome = next((each for each in ("failure", "error", "skipped") if case.find(each) is not None), "passed")
        counted["failed" if outcome in ("failure", "error") else outcome] += 1
        values = [int(x.attrib["value"]) for x in case.iter("property") if x.attrib["name"] == "shapes"]
        counted["shapes"] += sum(values)
    return counted


def summary(passed: dict[str, dict[str, float]], planned: list[Piece]) -> str:
    """Return what has been proven so far, in one line."""
    done = [piece for piece in planned if piece.name in passed]

    def total(key: str, start: str) -> int:
        return sum(int(passed[piece.name][key]) for piece in done if piece.name.startswith(start))

    return (
        f"{len(done)} of {len(planned)} pieces: {total('passed', 'machine')} kernels within their budgets, "
        f"{total('shapes', 'shapes')} random shapes, {total('shapes', 'Address')} under AddressSanitizer, "
        f"{total('passed', 'planted')} planted errors caught, "
        f"{total('passed', 'tests') + total('passed', 'shapes') + total('passed', 'Address')} tests"
    )


def main() -> int:
    """Run what has not passed yet; exit status 1 if something failed, 3 if time was up before the end."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further piece after so long")
    parser.add_argument("--shapes", type=int, default=2000)
    parser.add_argument("--sanitized", type=int, default=200)
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    planned = pieces(arguments.shapes, arguments.sanitized)
    PROOF.mkdir(parents=True, exist_ok=True)
    kept = PROOF / f"{state()}.json"
    passed: dict[str, dict[str, float]] = json.loads(kept.read_text()) if kept.is_file() else {}
    if arguments.list:
        print(*(f"{'passed' if piece.name in passed else 'to do ':6}  {piece.name}" for piece in planned), sep="\n")
    elif not _prove(planned, passed, kept, arguments.minutes):
        return 1
    print(summary(passed, planned))
    return 0 if arguments.list or all(piece.name in passed for piece in planned) else 3


def _prove(planned: list[Piece], passed: dict[str, dict[str, float]], kept: Path, minutes: float) -> bool:
    began = time.monotonic()
    for place, piece in enumerate(planned, 1):
        if piece.name in passed:
            continue
        if time.monotonic() - began > 60 * minutes:
            print("time is up; the same command goes on from here")
            break
        print(f"[{place} of {len(planned)}] {piece.name}", flush=True)
        found = run(piece, PROOF / "report.xml")
        if found is None:
            return False
        passed[piece.name] = found
        kept.write_text(json.dumps(passed, indent=1) + "\n")
        print(f"    {found['passed']:.0f} passed, {found['shapes']:.0f} shapes, {found['seconds']:.0f} s", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
