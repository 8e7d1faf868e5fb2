"""Kill a dataset's writer at a random moment, or fill its disk, start it again, and look what is lost or left."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from megacogvx.data.indexed import IndexedDataset
from megacogvx.data.indexed.verify import verify_dataset
from megacogvx.errors import DataError
from megacogvx.testing.tiny_dataset import write_tiny_dataset

SAMPLES, SHARDS = 48, 6
FINISHED, REFUSED, OTHER = 0, 3, 4  # how a child that writes a dataset ends


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
    child = _writer(folder, samples)
    time.sleep(random.Random(seed).uniform(0, 1.1) * whole)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return finish_and_compare(folder, samples)


def fill_and_resume(folder: Path, seed: int, samples: int = SAMPLES) -> str:
    """Write a dataset in a child whose files can't grow beyond a random size, as on a full disk; then finish it here.

    The writer has to say so with a typed error. Its limit is the kernel's on the size of a file (EFBIG instead of
    ENOSPC), drawn up to what the largest file of a whole write has.

    Returns:
        What is wrong afterwards; empty if nothing is.
    """
    write_tiny_dataset(folder, samples, shards=SHARDS)
    largest = max(path.stat().st_size for path in folder.iterdir())
    shutil.rmtree(folder)
    limit = random.Random(seed).randrange(largest + 200)

    def narrow() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    status = os.waitpid(_writer(folder, samples, narrow), 0)[1]
    code = os.waitstatus_to_exitcode(status)
    if code not in (FINISHED, REFUSED) or (code == FINISHED) != (limit >= largest):
        return f"the writer ended with {code} at a limit of {limit} bytes, the largest file has {largest}"
    return finish_and_compare(folder, samples)


def _writer(folder: Path, samples: int, prepare: Callable[[], None] = lambda: None) -> int:
    """Return the process id of a child that writes the dataset."""
    child = os.fork()
    if child:
        return child
    code = OTHER
    try:
        prepare()
        write_tiny_dataset(folder, samples, shards=SHARDS)
        code = FINISHED
    except DataError:
        code = REFUSED
    finally:
        os._exit(code)


def finish_and_compare(folder: Path, samples: int) -> str:
    """Finish an interrupted dataset of `samples` samples.

    Returns:
        What is wrong afterwards; empty if nothing is: no finished shard was written again, every sample is there once,
        all checksums hold, and no temporary file is left.
    """
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
