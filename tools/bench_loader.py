#!/usr/bin/env python
"""Assemble packs of 700k tokens, four samples of 43 MB of moments each, in memory that exists; beside reads alone.

reads    `IndexedDataset.read_into` of the same samples, one after another
packs    `read_pack`: the table of the pack, and its tensors
loader   `PackLoader`: also the plan, the layouts of the step's packs, the guard of stuck reads, two threads

Rates are bytes a second of CPU time, of both threads together, the page cache being warm; the three take turns.
python tools/bench_loader.py                                                                    (two minutes, 350 MB)
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from bench_data import LARGE, write
from rich.console import Console
from rich.table import Table

from megacogvx.data.config import DataConfig
from megacogvx.data.corpus import Corpus
from megacogvx.data.indexed.record import Record
from megacogvx.data.loader import PackLoader
from megacogvx.data.pack import read_pack
from megacogvx.data.planner import PackPlan
from megacogvx.log import progress

SAMPLES, PER_PACK, TOKENS, PATCH = 8, 4, 700_000, (1, 2, 2)
PASSES, STEPS = 7, 10  # steps of a pass: two packs each


class Ring:
    """Memory that is given out again and again, as a pool of pinned memory is; `given` bytes so far."""

    def __init__(self, size: int) -> None:
        self._memory, self._place, self.given = torch.zeros(size, dtype=torch.uint8), 0, 0

    def __call__(self, size: int) -> torch.Tensor:
        """Return uint8 `[size]`."""
        if self._place + size > len(self._memory):
            self._place = 0
        self._place += size
        self.given += size
        return self._memory[self._place - size : self._place]


def reads(corpus: Corpus, memory: Ring) -> Iterator[None]:
    """Read the samples of a step by `read_into`."""
    size = 64 * (LARGE[0] * LARGE[1] * LARGE[2] + 1024)  # moments in bf16, and a text
    while True:
        for index in range(SAMPLES):
            buffer = memory(size).numpy()
            memory.given += corpus.read_into(index, buffer) - size
        yield


def packs(corpus: Corpus, memory: Ring) -> Iterator[None]:
    """Read the samples of a step as packs."""

    def read(index: int, frames: range | None, first_frame: bool) -> Record:
        return corpus.sample_in(memory, index, frames, first_frame)

    while True:
        for place, start in enumerate(range(0, SAMPLES, PER_PACK)):
            read_pack(corpus, range(start, start + PER_PACK), PATCH, TOKENS, 0, place, read=read)
        yield


def loader(corpus: Corpus, memory: Ring) -> Iterator[None]:
    """Take a step's packs from a loader that doesn't read ahead of it by more than one."""
    config = DataConfig(paths=("x",), tokens_per_pack=TOKENS, packs_per_step=SAMPLES // PER_PACK, prefetch=1)
    plan = PackPlan(corpus.columns, config, 0, PATCH)
    with PackLoader(corpus, plan, allocate=memory) as loaded:
        for _ in loaded:
            yield


METHODS: dict[str, Callable[[Corpus, Ring], Iterator[None]]] = {"reads": reads, "packs": packs, "loader": loader}


def rates(folder: Path, verify: str, passes: int) -> dict[str, tuple[float, float]]:
    """Return (bytes per CPU second, that over the rate of `reads`) of each method: medians of the passes."""
    corpus = Corpus(DataConfig(paths=(str(folder),), tokens_per_pack=TOKENS, verify=verify))  # type: ignore[arg-type]
    memory = Ring(1 << 30)
    found: dict[str, list[float]] = {name: [] for name in METHODS}
    for turn in progress(range(passes + 1), f"verify={verify}"):
        for name, method in METHODS.items():
            steps = method(corpus, memory)
            next(steps)  # starts threads, fills what is read ahead
            began, given = time.process_time(), memory.given
            for _ in range(STEPS):
                next(steps)
            steps.close()  # type: ignore[attr-defined]
            if turn:
                found[name].append((memory.given - given) / (time.process_time() - began))
    over = {name: statistics.median(a / b for a, b in zip(found[name], found["reads"], strict=True)) for name in found}
    return {name: (statistics.median(found[name]), over[name]) for name in found}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, default=PASSES)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(title=f"packs of {TOKENS:,} tokens: GB/s of CPU time, and over reads")
    for name in ("verify", *METHODS):
        table.add_column(name)
    with tempfile.TemporaryDirectory() as root:
        write(Path(root), [LARGE] * SAMPLES)
        for verify in ("never", "always"):
            cells = rates(Path(root), verify, arguments.passes).values()
            table.add_row(verify, *(f"{rate / 1e9:.2f}  {over:.3f}" for rate, over in cells))
    Console(width=max(80, Console().width)).print(table)


if __name__ == "__main__":
    main()
