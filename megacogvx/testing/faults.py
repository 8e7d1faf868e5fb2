"""Trainings of a tiny model on several processes, with one fault planted, as tests and `make faults` start them.

A start is all ranks of one `megacogvx train`, forked from the server that has imported megatron-core. A fault is a
function of `fault_points.py`, called by name in the rank that it is for, which changes what the training will meet at
a certain step: it kills the process, spoils a gradient, fills the disk. Only the processes of that start see it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from megacogvx.testing import spawn
from megacogvx.testing.fault_points import Fault
from megacogvx.testing.fault_rank import run_rank
from megacogvx.testing.tiny_dataset import write_tiny_dataset

SILENT_SECONDS = 120.0  # without a line, a row or a file of the run folder, a start has come to a stand
PEER_SECONDS = 60.0  # a collective without its peer fails by then at the latest
STEPS = 6
SAVE_EVERY = 2
USER_ERROR_STATUS = 2  # as the command line ends with

CONFIG: dict[str, dict[str, Any]] = {
    "model": {
        "preset": "tiny", "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 4,
        "out_channels": 4, "text_embed_dim": 8, "max_text_seq_length": 6,
    },
    "data": {"tokens_per_pack": 64, "packs_per_step": 4},
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0, "decay_steps": 100},
    "training": {"seed": 3, "steps": STEPS, "save_every": SAVE_EVERY},
    "parallel": {"device": "cpu", "timeout_minutes": PEER_SECONDS / 60},
    "guard": {"stuck_seconds": None, "slow_factor": None},
    "tracking": {"tensorboard": False},
}  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How a start ended: exit status by rank (negative: by that signal), its seconds, and what each rank wrote."""

    statuses: list[int | None]
    seconds: float
    output: list[str]

    @property
    def well(self) -> bool:
        """Whether every rank ended with status 0."""
        return all(status == 0 for status in self.statuses)


class Training:
    """One run folder and the starts of its run.

    Args:
        folder: holds the run, its dataset unless another is named, and the ranks' output.
        ranks: processes.
        parallel: the layout, fields of section `parallel`.
        dataset: an indexed dataset; None writes a tiny one.
        changes: settings by section, over `CONFIG`.
    """

    def __init__(
        self,
        folder: Path,
        ranks: int = 2,
        parallel: Mapping[str, Any] | None = None,
        *,
        dataset: Path | None = None,
        changes: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.folder, self.ranks, self.parallel = folder, ranks, dict(parallel or {})
        self.changes = {name: dict(section) for name, section in (changes or {}).items()}
        self.dataset = dataset or folder / "dataset"
        self.run, self.held_out = folder / "run", self.dataset.with_name("held_out")
        if not self.dataset.exists():
            write_tiny_dataset(self.dataset)
            write_tiny_dataset(self.held_out, 8, first_id=9000)

    def config(self, changes: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Any]:
        """Return all settings of a start."""
        values = {name: dict(section) for name, section in CONFIG.items()}
        values["data"]["paths"] = [str(self.dataset)]
        values["validation"] = {"paths": [str(self.held_out)], "timesteps": [100, 900]}
        values["training"]["run_folder"] = str(self.run)
        for section, settings in [("parallel", self.parallel), *self.changes.items(), *(changes or {}).items()]:
            values.setdefault(section, {}).update(settings)
        return values

    def start(
        self,
        *faults: Fault,
        changes: Mapping[str, Mapping[str, Any]] | None = None,
        meanwhile: Callable[[list[ForkServerProcess]], None] | None = None,
        grace: float = PEER_SECONDS,
    ) -> Ended:
        """Start all ranks and wait until they have ended.

        Args:
            faults: what is planted.
            changes: settings of this start alone.
            meanwhile: called with the processes once they run.
            grace: seconds that are left to the other ranks when one has failed.
        """
        output = self.folder / "output"
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        config, port, began = self.config(changes), spawn.free_port(), time.monotonic()
        processes = []
        for rank in range(self.ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.ranks, "LOCAL_WORLD_SIZE": self.ranks}
            environment: dict[str, Any] = {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "STARTED": began}
            mine = [fault for fault in faults if fault.rank in (None, rank)]
            processes.append(
                spawn.server.Process(target=run_rank, args=(config, output / str(rank), environment, mine))
            )
            processes[-1].start()
        if meanwhile is not None:
            meanwhile(processes)
        statuses = _wait(processes, [output, self.run], grace)
        texts = [(output / str(rank)).read_text(errors="replace") for rank in range(self.ranks)]
        return Ended(statuses, time.monotonic() - began, texts)

    def start_by_torchrun(self, *faults: Fault, restarts: int = 1) -> Ended:
        """Start under torchrun, which starts all ranks again when one has failed; the faults strike the first time."""
        plan = self.folder / "torchrun.json"
        plan.write_text(json.dumps({"config": self.config(), "faults": [vars(fault) for fault in faults]}))
        words = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks)]
        words += ["--max-restarts", str(restarts), "-m", "megacogvx.testing.fault_rank", str(plan)]
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", *words], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        return Ended([done.returncode], time.monotonic() - began, [done.stdout + done.stderr])

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints."""
        from megacogvx.checkpoint.directory import CheckpointDirectory

        return CheckpointDirectory(self.run / "checkpoints").steps()

    def rows(self, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
        """Return the rows of a file of the run folder."""
        file = self.run / name
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def identical(actual: Training, expected: Training, step: int = STEPS) -> list[str]:
    """Compare two runs byte for byte: weights, moments and master weights, state, loss history, samples consumed.

    Returns:
        what differs; empty if they are identical.
    """
    from megacogvx.checkpoint.directory import CheckpointDirectory
    from megacogvx.checkpoint.manifest import read_manifest, verify
    from megacogvx.checkpoint.whole import read_state

    ours, theirs = (CheckpointDirectory(one.run / "checkpoints").path(step) for one in (actual, expected))
    if not ours.is_dir():
        return [f"there is no checkpoint of step {step}"]
    verify(ours)
    # `.metadata` holds the folder's name and a random number; `config.yaml` holds the folder's name.
    names = ("common.pt", "distcp")
    files = [
        {name: entry.xxh3 for name, entry in read_manifest(path)[1].items() if name.endswith(names)}
        for path in (ours, theirs)
    ]
    problems = [
        f"{name} differs" for name in files[0].keys() | files[1].keys() if files[0].get(name) != files[1].get(name)
    ]
    if read_state(ours)["state"] != read_state(theirs)["state"]:
        problems.append("the state differs")
    numbers = ("step", "loss", "loss_by_interval", "grad_norm", "lr", "samples", "tokens", "validation_loss")
    histories = [[{name: row.get(name) for name in numbers} for row in one.rows()] for one in (actual, expected)]
    if histories[0] != histories[1]:
        problems.append("the loss history differs")
    return problems + [
        f"{word} {count} samples" for word, count in samples_lost_and_repeated(actual, expected) if count
    ]


def samples_lost_and_repeated(actual: Training, expected: Training) -> list[tuple[str, int]]:
    """Return how many samples the run's history lacks, and has too often, against an uninterrupted run's.

    A step that was done again after a crash counts once, as its last update: the ones before went with the crash.
    """
    ours, theirs = (
        [(step, sample) for step, ids in sorted(_consumed(one).items()) for sample in ids] for one in (actual, expected)
    )
    lost = [pair for pair in theirs if ours.count(pair) < theirs.count(pair)]
    repeated = [pair for pair in ours if ours.count(pair) > theirs.count(pair)]
    return [("lost", len(lost)), ("repeated", len(repeated))]


def _consumed(training: Training) -> dict[int, list[int]]:
    """Return the sample ids of each step's last update, over the data ranks."""
    parts: dict[int, dict[float, dict[int, list[int]]]] = {}
    for file in sorted(training.run.glob("consumed-*.jsonl")):
        for line in file.read_text().splitlines():
            step, started, place, ids = json.loads(line)
            parts.setdefault(step, {}).setdefault(started, {})[place] = ids
    last = {step: starts[max(starts)] for step, starts in parts.items()}
    return {step: sorted(sample for ids in places.values() for sample in ids) for step, places in last.items()}


def _wait(processes: Sequence[ForkServerProcess], written: Sequence[Path], grace: float) -> list[int | None]:
    """Wait for all ranks, as long as anything is written; those left when one has failed get some seconds more.

    On a busy machine everything takes longer, but something goes on.
    """
    seen, end = 0, time.monotonic() + SILENT_SECONDS
    failed = False
    while time.monotonic() < end:
        codes = [process.exitcode for process in processes]
        if all(code is not None for code in codes):
            break
        if any(code not in (None, 0) for code in codes) and not failed:  # as a launcher would
            failed, end = True, time.monotonic() + grace
        if not failed and seen != (seen := _size_of(written)):
            end = time.monotonic() + SILENT_SECONDS
        time.sleep(0.05)
    statuses = [process.exitcode for process in processes]
    for process in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid or 0, signal.SIGKILL)  # with the writers that it may have left
        process.join()
    return statuses


def _size_of(folders: Sequence[Path]) -> int:
    """Return the bytes in the folders' own files and the number of those files' names."""
    total = 0
    for folder in folders:
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(folder):
                total += 1 + entry.stat(follow_symlinks=False).st_size
    return total
