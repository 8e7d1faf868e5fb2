"""Kill a dataset's writer at a random moment, start it again, and look whether anything is lost or left."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

from megacogvx.data.indexed import IndexedDataset
from megacogvx.data.indexed.verify import verify_dataset
from megacogvx.testing.tiny_dataset import write_tiny_dataset

SAMPLES, SHARDS = 48, 6


def kill_and_resume(folder: Path, seed: int, samples: int = SAMPLES) -> str:
    """Write a dataset in a child that is killed after a random time; then finish it here.

    Shards that were finished at the kill must stay byte for byte. The times are spread over what a whole write takes
    on this machine.

    Returns:
        What is wrong afterwards; empty if nothing is.
    """
    began = time.perf_counter()
    write_tiny_dataset(folder, samples, shards=SHARDS)
    whole = time.perf_counter() - began
    shutil.rmtree(folder)
    child = os.fork()
    if not child:
        try:
            write_tiny_dataset(folder, samples, shards=SHARDS)
        finally:
            os._exit(0)
    time.sleep(random.Random(seed).uniform(0, 1.1) * whole)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    finished = {path: path.with_suffix(".bin").read_bytes() for path in folder.glob("*.idx")}
    write_tiny_dataset(folder, samples, shards=SHARDS)
    report = verify_dataset(folder)
    if report.problems:
        return f"verify: {report.problems[0]}"
    if sorted(IndexedDataset(folder).sample_id.tolist()) != list(range(1000, 1000 + samples)):
        return "samples are missing or repeated"
    changed = [path.name for path, data in finished.items() if path.with_suffix(".bin").read_bytes() != data]
    if changed or any(folder.glob("*.tmp")):
        return f"finished shards were written again: {changed}" if changed else "a temporary file is left"
    return ""
