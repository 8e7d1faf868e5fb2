"""Seeded mutations of input files, parsed in limited processes of their own: error, equal result, or a finding.

A parser of outside bytes may answer a damaged file with a typed error that names it, or with the result of the sound
one. A crash, a hang, another exception, a different result, or memory beyond the limit is a finding.
"""

from __future__ import annotations

import faulthandler
import json
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
SLACK = 8 << 20  # bytes; allocator, interpreter and the error's text
EQUAL, REFUSED, NAMELESS, DIFFERENT, OTHER_ERROR, MEMORY, CRASHED = range(7)
NAMES = (
    "equal", "typed error", "typed error without the file's name", "different result", "other exception",
    "out of memory", "crash or hang",
)  # fmt: skip
FINDINGS = (NAMELESS, DIFFERENT, OTHER_ERROR, MEMORY, CRASHED)


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
    """Return `data` with one to three random changes of `CHANGES`."""
    draw = np.random.default_rng(seed)
    for _ in range(int(draw.integers(1, 4))):
        place, kind = int(draw.integers(0, max(1, len(data)))), int(draw.integers(0, len(CHANGES)))
        data = CHANGES[kind](data, place, draw)
    return data


def _flip_bit(data: bytes, place: int, draw: np.random.Generator) -> bytes:
    flipped = bytes(byte ^ (1 << int(draw.integers(8))) for byte in data[place : place + 1])
    return data[:place] + flipped + data[place + 1 :]


def _cut_off(data: bytes, place: int, draw: np.random.Generator) -> bytes:
    return data[:place]


def _insert(data: bytes, place: int, draw: np.random.Generator) -> bytes:
    return data[:place] + draw.bytes(int(draw.integers(1, 64))) + data[place:]


def _leave_out(data: bytes, place: int, draw: np.random.Generator) -> bytes:
    return data[:place] + data[place + int(draw.integers(1, 64)) :]


def _repeat_other_bytes(data: bytes, place: int, draw: np.random.Generator) -> bytes:
    other = int(draw.integers(0, max(1, len(data))))
    return data[:place] + data[other : other + 32] + data[place + 32 :]


def _write_extreme_number(data: bytes, place: int, draw: np.random.Generator) -> bytes:
    extreme = [0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1][int(draw.integers(6))]
    width = [4, 8][int(draw.integers(2))]
    start = place // width * width
    return data[:start] + (extreme % 2 ** (8 * width)).to_bytes(width, "little") + data[start + width :]


def _overwrite(data: bytes, place: int, draw: np.random.Generator) -> bytes:
    return data[:place] + draw.bytes(int(draw.integers(1, 9))) + data[place + 8 :]


CHANGES = (_flip_bit, _cut_off, _insert, _leave_out, _repeat_other_bytes, _write_extreme_number, _overwrite)


def fuzz(
    path: Path, parse: Callable[[], Any], seeds: range, *, mutation: Callable[[bytes, int], bytes] = mutate,
    memory: int | None = None, slack: int = SLACK,
) -> FuzzReport:  # fmt: skip
    """Parse mutations of the file at `path`, which is put back afterwards.

    Args:
        path: the file to mutate.
        parse: reads it (and what belongs to it) and returns a comparable result.
        seeds: one mutation each.
        mutation: makes it.
        memory: bytes of address space that a parse may take beyond what the process holds; None: twice the file, and
            `slack`.
        slack: what interpreter, allocator and libraries take whatever the file holds, bytes.

    Returns:
        The counts; a finding can be looked into by its seed.
    """
    original, report = path.read_bytes(), FuzzReport()
    trial = _Trial(path, original, parse, parse(), mutation, 2 * len(original) + slack if memory is None else memory)
    left = list(seeds)
    try:
        while left:
            for outcome, detail in _in_child(trial, left):
                seed = left.pop(0)
                report.outcomes[NAMES[outcome]] += 1
                if outcome in FINDINGS:
                    report.findings.append((seed, NAMES[outcome], detail))
    finally:
        path.write_bytes(original)
    return report


@dataclass(frozen=True)
class _Trial:
    path: Path
    original: bytes
    parse: Callable[[], Any]
    expected: Any
    mutation: Callable[[bytes, int], bytes]
    limit: int


def _in_child(trial: _Trial, seeds: list[int]) -> list[tuple[int, str]]:
    """Run `seeds` in one fork of this process, up to the first whose finding may have hurt it.

    Returns:
        How each ended and a line about it, of at least one seed: a child that dies, dies of the next one.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(read_end)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders and destructors have much to say
            _run_seeds(trial, seeds, write_end)
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        ended: list[tuple[int, str]] = [tuple(json.loads(line)) for line in pipe if line.endswith(b"\n")]
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return [*ended, (CRASHED, f"signal {signal.Signals(os.WTERMSIG(status)).name}")]
    return ended or [(CRASHED, f"ended with status {os.waitstatus_to_exitcode(status)}")]


def _run_seeds(trial: _Trial, seeds: list[int], pipe: int) -> None:
    """Parse one mutation after the other; tell each outcome through `pipe` before the next begins."""
    faulthandler.disable()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    for seed in seeds:
        trial.path.write_bytes(trial.mutation(trial.original, seed))
        signal.alarm(HANG_SECONDS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + trial.limit, hard))
        outcome, detail = _outcome(trial)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        os.write(pipe, (json.dumps([outcome, detail[-2000:]]) + "\n").encode())
        if outcome == MEMORY:  # what is left of the process may be anything
            return


def _outcome(trial: _Trial) -> tuple[int, str]:
    try:
        found = trial.parse()
    except MegacogvxError as error:
        return (REFUSED if trial.path.stem in str(error) else NAMELESS), str(error)
    except MemoryError:
        return MEMORY, traceback.format_exc(limit=-2)
    except BaseException:
        return OTHER_ERROR, traceback.format_exc(limit=-3)
    return (EQUAL, "") if found == trial.expected else (DIFFERENT, repr(found)[:500])
