"""Seeded mutations of input files, each parsed in a limited process of its own: error, equal result, or a finding.

A parser of outside bytes may answer a damaged file with a typed error or with the result of the sound one. A crash, a
hang, another exception, a different result, or memory beyond the limit is a finding.
"""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megacogvx.errors import MegacogvxError

HANG_SECONDS = 20
EQUAL, REFUSED, DIFFERENT, OTHER_ERROR, MEMORY, CRASHED = range(6)
NAMES = ("equal", "typed error", "different result", "other exception", "out of memory", "crash or hang")
FINDINGS = (DIFFERENT, OTHER_ERROR, MEMORY, CRASHED)


@dataclass
class FuzzReport:
    """How many of the mutations ended how.

    Attributes:
        outcomes: name of the outcome -> number.
        findings: (seed, outcome, detail) of everything but an equal result and a typed error.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[tuple[int, str, str]] = field(default_factory=list)


def mutate(data: bytes, seed: int) -> bytes:
    """Return `data` with one to three random changes: flips, overwrites, cuts, insertions, swaps, extreme numbers."""
    draw = np.random.default_rng(seed)
    for _ in range(int(draw.integers(1, 4))):
        place, kind = int(draw.integers(0, max(1, len(data)))), int(draw.integers(0, 7))
        if kind == 0:
            flipped = bytes(byte ^ (1 << int(draw.integers(8))) for byte in data[place : place + 1])
            data = data[:place] + flipped + data[place + 1 :]
        elif kind == 1:
            data = data[:place]
        elif kind == 2:
            data = data[:place] + draw.bytes(int(draw.integers(1, 64))) + data[place:]
        elif kind == 3:
            data = data[:place] + data[place + int(draw.integers(1, 64)) :]
        elif kind == 4:
            other = int(draw.integers(0, max(1, len(data))))
            data = data[:place] + data[other : other + 32] + data[place + 32 :]
        elif kind == 5:
            extreme = [0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1][int(draw.integers(6))]
            width = [4, 8][int(draw.integers(2))]
            number = (extreme % 2 ** (8 * width)).to_bytes(width, "little")
            data = data[: place // width * width] + number + data[place // width * width + width :]
        else:
            data = data[:place] + draw.bytes(int(draw.integers(1, 9))) + data[place + 8 :]
    return data


def fuzz(
    path: Path, parse: Callable[[], Any], seeds: range, *, mutation: Callable[[bytes, int], bytes] = mutate,
    memory: int | None = None,
) -> FuzzReport:  # fmt: skip
    """Parse mutations of the file at `path`, which is put back afterwards.

    Args:
        path: the file to mutate.
        parse: reads it (and what belongs to it) and returns a comparable result.
        seeds: one mutation each.
        mutation: makes it.
        memory: bytes that a parse may allocate beyond what the process holds; None: 64 MiB and twice the file.

    Returns:
        The counts; a finding can be looked into by its seed.
    """
    original, expected, report = path.read_bytes(), parse(), FuzzReport()
    limit = 2 * len(original) + (64 << 20) if memory is None else memory
    try:
        for seed in seeds:
            changed = mutation(original, seed)
            path.write_bytes(changed)
            outcome, detail = _in_child(parse, expected, limit)
            report.outcomes[NAMES[outcome]] += 1
            if outcome in FINDINGS:
                report.findings.append((seed, NAMES[outcome], detail))
    finally:
        path.write_bytes(original)
    return report


def _in_child(parse: Callable[[], Any], expected: Any, limit: int) -> tuple[int, str]:
    """Run `parse` in a fork of this process; returns how it ended and a line about it."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        outcome, detail = OTHER_ERROR, ""
        try:
            os.close(read_end)
            faulthandler.disable()
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(HANG_SECONDS)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            size = pages * os.sysconf("SC_PAGE_SIZE") + limit
            resource.setrlimit(resource.RLIMIT_AS, (size, size))
            outcome, detail = _outcome(parse, expected)
            os.write(write_end, detail.encode()[:2000])
        finally:
            os._exit(outcome)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        detail = pipe.read().decode(errors="replace")
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return CRASHED, f"signal {signal.Signals(os.WTERMSIG(status)).name}"
    return os.WEXITSTATUS(status), detail


def _outcome(parse: Callable[[], Any], expected: Any) -> tuple[int, str]:
    try:
        found = parse()
    except MegacogvxError as error:
        return REFUSED, str(error)
    except MemoryError:
        return MEMORY, traceback.format_exc(limit=-2)
    except BaseException:
        return OTHER_ERROR, traceback.format_exc(limit=-3)
    return (EQUAL, "") if found == expected else (DIFFERENT, repr(found)[:500])
