"""The verb `doctor`: is this machine, and each of those started with it, fit to train? Launchers run it first.

Every rank looks at its own machine; then the ranks compare what has to be equal, see whether they share a file system,
and measure an all-reduce.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megacogvx.errors import LaunchError
from megacogvx.log import get_logger
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.groups import (
    ParallelGroups,
    barrier,
    broadcast_json,
    gather_json,
    groups_of_a_program,
    initialize,
)
from megacogvx.parallel.launch import launch_environment
from megacogvx_kernels import compiled

EXAMPLE = """example:
  torchrun --nproc-per-node 8 -m megacogvx doctor --folder runs/cogvideox_5b_stage1

Warnings are printed and the exit status stays 0; a problem that would end the run gives status 2."""
PACKAGES = ("torch", "megatron-core", "numpy", "transformer-engine", "flash-attn", "apex", "megacogvx")
GPU_LIBRARIES = ("transformer_engine", "flash_attn", "apex")
SHARED_MEMORY_PER_RANK = 1 << 30  # bytes of /dev/shm; NCCL and the writers of checkpoints use it
OPEN_FILES = 65536
CLOCK_SECONDS = 1.0  # between machines; log lines of a fault can't be put in order beyond it
WRITTEN_BYTES = 64 << 20
REPEATS = 5

logger = get_logger(__name__)


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        name: what.
        value: what was found.
        warning: why it may hurt, and the way out; "" if it is fine.
        problem: why a run would fail, and the way out; "" if it wouldn't.
    """

    name: str
    value: str
    warning: str = ""
    problem: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("--folder", type=Path, default=Path("."), help="where the run will write (default: here)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="as parallel.device")
    parser.add_argument("--megabytes", type=float, default=256.0, help="of the all-reduce (default: %(default)s)")
    parser.add_argument("--timeout-minutes", type=float, default=5.0, help="until the others have to be there")


def run(arguments: argparse.Namespace) -> None:
    """Look, compare, measure, print.

    Raises:
        LaunchError: something would end a run; every such thing is named with its machine.
    """
    with groups_of_a_program():
        groups = initialize(ParallelConfig(device=arguments.device, timeout_minutes=arguments.timeout_minutes))
        findings = examine(arguments.folder, groups, int(arguments.megabytes * 1e6))
        report(findings, groups)


def examine(folder: Path, groups: ParallelGroups, all_reduce_bytes: int) -> list[Finding]:
    """Return what this rank found; every rank calls it.

    Args:
        folder: where the run will write.
        groups: all ranks, data parallel.
        all_reduce_bytes: size of the measured all-reduce.
    """
    local = [
        versions(), gpu_libraries(groups.device), compiled_ops(groups.device), device(groups.device),
        shared_memory(Path("/dev/shm")), open_files(), locked_memory(groups.device), write_test(folder, groups.rank),
    ]  # fmt: skip
    return [*local, same_versions(groups), clock(groups), shared_folder(folder, groups),
            all_reduce(groups, all_reduce_bytes)]  # fmt: skip


def report(findings: list[Finding], groups: ParallelGroups) -> None:
    """Log rank 0's findings, everybody's bandwidth, warnings and problems.

    Raises:
        LaunchError: there is a problem on any rank.
    """
    host = socket.gethostname()
    rows = gather_json({"host": host, "findings": [vars(finding) for finding in findings]}, groups)
    if groups.is_first:
        for finding in findings:
            logger.info("%-16s %s", finding.name, finding.value)
        for rank, row in enumerate(rows[1:], 1):
            logger.info("rank %-4d %-6s all-reduce %s", rank, row["host"], row["findings"][-1]["value"])
    for kind, level in (("warning", logger.warning), ("problem", logger.error)):
        for text, where in _told_once(rows, kind).items():
            if groups.is_first:
                level("%s: %s", where, text)
    problems = _told_once(rows, "problem")
    if problems:
        raise LaunchError("; ".join(f"{where}: {text}" for text, where in problems.items()))


def versions() -> Finding:
    """Return the versions of Python, the packages, CUDA and NCCL."""
    found = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    if torch.cuda.is_available():
        found |= {"cuda": str(torch.version.cuda), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    return Finding("versions", ", ".join(f"{name} {version}" for name, version in found.items() if version))


def gpu_libraries(device: torch.device) -> Finding:
    """Return which of the optional GPU libraries can be imported."""
    there = [name for name in GPU_LIBRARIES if importlib.util.find_spec(name)]
    missing = [name for name in GPU_LIBRARIES if name not in there]
    warning = f"not installed: {', '.join(missing)}; slower paths are taken (the Dockerfile has them all)"
    return Finding("GPU libraries", ", ".join(there) or "none", warning if missing and device.type == "cuda" else "")


def compiled_ops(device: torch.device) -> Finding:
    """Return for which devices the ops of `megacogvx_kernels` are compiled."""
    there = compiled.available()
    warning = (
        "the project's ops are not compiled for GPUs, their plain definitions answer, several times slower; install it "
        "again where nvcc is, with MEGACOGVX_KERNELS=cuda"
    )
    lacks = device.type == "cuda" and "cuda" not in there
    return Finding("compiled ops", ", ".join(sorted(there)) or "none", warning if lacks else "")


def device(device: torch.device) -> Finding:
    """Return what this rank computes on."""
    if device.type != "cuda":
        return Finding("device", f"cpu, {torch.get_num_threads()} threads")
    properties = torch.cuda.get_device_properties(device)
    return Finding("device", f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB")


def shared_memory(folder: Path, ranks: int | None = None) -> Finding:
    """Return the free bytes of /dev/shm; containers get 64 MB unless they are told otherwise."""
    wanted = SHARED_MEMORY_PER_RANK * (launch_environment().local_world_size if ranks is None else ranks)
    free = shutil.disk_usage(folder).free if folder.is_dir() else 0
    warning = (
        f"{folder} has {free / 2**30:.2f} GiB free, the ranks of a node want {wanted / 2**30:.0f}; start the container "
        "with --ipc=host or --shm-size, or mount an emptyDir of medium Memory there"
    )
    return Finding("shared memory", f"{free / 2**30:.2f} GiB free", warning if free < wanted else "")


def open_files() -> Finding:
    """Return the limit of open files (ulimit -n)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
    low = soft != resource.RLIM_INFINITY and soft < OPEN_FILES
    warning = f"ulimit -n is {soft}, shards and sockets may need {OPEN_FILES}; raise it up to the hard limit {hard}"
    return Finding("open files", text, warning if low else "")


def locked_memory(device: torch.device) -> Finding:
    """Return the limit of locked memory (ulimit -l), which RDMA and pinned buffers take."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    text = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft / 2**20:.0f} MiB"
    warning = f"ulimit -l is {text}: InfiniBand registers memory beyond it and fails; set it to unlimited"
    limited = soft != resource.RLIM_INFINITY and device.type == "cuda"
    return Finding("locked memory", text, warning if limited else "")


def write_test(folder: Path, rank: int, size: int = WRITTEN_BYTES) -> Finding:
    """Write, sync, rename, read back and remove a file of `size` bytes in `folder`."""
    temporary, final = folder / f".doctor-{rank}.tmp", folder / f".doctor-{rank}"
    data = bytes(range(256)) * (size // 256)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(final)
        seconds = time.perf_counter() - began
        equal = final.read_bytes() == data
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding("write test", "failed", problem=f"can't write to {folder}: {error}; choose another folder")
    finally:
        for path in (temporary, final):
            with contextlib.suppress(OSError):
                path.unlink()
    problem = "" if equal else f"{folder} gave back other bytes than were written; don't use this file system"
    return Finding("write test", f"{size / seconds / 1e6:.0f} MB/s, {free / 2**30:.1f} GiB free", problem=problem)


def same_versions(groups: ParallelGroups) -> Finding:
    """Compare the versions of all ranks with rank 0's."""
    everybody = gather_json(versions().value, groups)
    differing = [f"rank {rank} has {other}" for rank, other in enumerate(everybody) if other != everybody[0]]
    problem = f"ranks run different versions: rank 0 has {everybody[0]}, {'; '.join(differing[:3])}; use one image"
    return Finding("same versions", "no" if differing else "yes", problem=problem if differing else "")


def clock(groups: ParallelGroups, now: Callable[[], float] = time.time) -> Finding:
    """Return how far the clocks of the ranks are apart, right after a barrier."""
    barrier(groups)
    times = gather_json(now(), groups)
    spread = max(times) - min(times)
    late = times.index(min(times))
    warning = f"clocks are {spread:.1f} s apart, rank {late}'s is the slowest; run chrony or ntpd on every node"
    return Finding("clock", f"{spread:.3f} s apart", warning if spread > CLOCK_SECONDS else "")


def shared_folder(folder: Path, groups: ParallelGroups) -> Finding:
    """See whether every rank finds in `folder` what rank 0 put there; checkpoints need that."""
    marker = folder / broadcast_json(f".doctor-shared-{time.time_ns()}", groups)
    if groups.is_first:
        with contextlib.suppress(OSError):  # the write test says so
            marker.touch()
    barrier(groups)
    found = gather_json(marker.exists(), groups)
    if groups.is_first:
        marker.unlink(missing_ok=True)
    blind = [rank for rank, there in enumerate(found) if not there]
    problem = (
        f"rank(s) {', '.join(map(str, blind[:8]))} don't see what rank 0 writes to {folder}; use a folder on a file "
        "system that all nodes mount"
    )
    return Finding("shared folder", "no" if blind else "yes", problem=problem if blind else "")


def all_reduce(groups: ParallelGroups, size: int) -> Finding:
    """Sum `size` bytes over all ranks and return this rank's bus bandwidth, 2 (g-1)/g * bytes / seconds."""
    ranks = groups.world_size
    values = torch.ones(max(1, size // 4), device=groups.device)
    dist.all_reduce(values)  # connects
    equal = bool((values == ranks).all())
    barrier(groups)
    began = time.perf_counter()
    for _ in range(REPEATS):
        dist.all_reduce(values)
    if groups.device.type == "cuda":
        torch.cuda.synchronize(groups.device)
    seconds = (time.perf_counter() - began) / REPEATS
    bandwidth = 2 * (ranks - 1) / ranks * values.nbytes / seconds
    text = f"{values.nbytes / 1e6:.0f} MB over {ranks} ranks: {bandwidth / 1e9:.2f} GB/s each"
    problem = "" if equal else f"an all-reduce of ones over {ranks} ranks gave something else; a GPU or a link is bad"
    return Finding("all-reduce", text, problem=problem)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _told_once(rows: list[dict[str, Any]], kind: str) -> dict[str, str]:
    """Return each message of `kind` with the first machine and rank that has it, and how many others do."""
    places: dict[str, list[str]] = {}
    for rank, row in enumerate(rows):
        for finding in row["findings"]:
            if finding[kind]:
                places.setdefault(finding[kind], []).append(f"{row['host']} rank {rank}")
    return {text: f"{at[0]}{f' and {len(at) - 1} more' if at[1:] else ''}" for text, at in places.items()}
