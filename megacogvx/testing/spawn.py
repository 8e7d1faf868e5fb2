"""Tests on several ranks: `on_ranks(2, ...)` turns a function of process groups into an ordinary pytest test.

A plain `pytest` starts the processes itself, once for all tests of a file with the same number of ranks, and once more
for the slow ones among them. On gloo they are forked from a server that has imported megatron-core once, which takes
eight seconds. Under `torchrun -m pytest` the tests run in the processes that are there, and those for another number of
ranks are skipped. Each test is there twice: on gloo, and with the mark `gpu` on NCCL, one GPU a process.

    @on_ranks(2, {"tensor_parallel_size": 2}, {"context_parallel_size": 2})
    def test_something(groups, folder): ...

Each process loads the file by its path, so the file must not run anything when it is imported. A test that fails or
hangs takes its processes with it; the others of the file get new ones.
"""

from __future__ import annotations

import faulthandler
import functools
import importlib.util
import inspect
import multiprocessing
import os
import shutil
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

CASE_SECONDS = 120.0  # a test that takes longer hangs
START_SECONDS = 180.0  # for all processes to import megatron-core on a busy machine
MANY_RANKS = 3  # a test that starts more processes than these is slow
DEVICES = ("cpu", "cuda")
LINES_SHOWN = 40  # of the output of each rank, when something went wrong

Layout = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One test on one layout."""

    function: Callable[..., None]
    layout: Layout
    device: str
    is_slow: bool = False

    @property
    def id(self) -> str:
        """How pytest calls this layout of a test."""
        return layout_name(self.layout) + ("-nccl" if self.device == "cuda" else "")

    @property
    def name(self) -> str:
        """How parent and workers call this case."""
        return f"{self.function.__name__}[{self.id}]"


# Its own import of this module is the tests' import, so a fork finds the cases that a test file registers.
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["megacogvx.testing.spawn", "megacogvx.training.setup", "pytest"])
# Not for GPUs: megatron-core asks whether there are any while it is imported (dist_checkpointing/strategies/torch.py),
# which starts CUDA's driver, and what is forked after that can't use it ("Cannot re-initialize CUDA in forked
# subprocess").
CONTEXTS: dict[str, ForkServerContext | SpawnContext] = {"cpu": server, "cuda": multiprocessing.get_context("spawn")}

_cases: dict[tuple[str, int, str], list[Case]] = {}  # by (file, ranks, device), in the order of the file
_outcomes: dict[tuple[str, int, str], dict[str, str]] = {}  # the same: {case name: "" or what went wrong}


def on_ranks(world_size: int, *layouts: Layout, slow: bool = False) -> Callable[[Callable[..., None]], Any]:
    """Run a test on `world_size` ranks, once for each layout.

    Args:
        world_size: number of processes.
        layouts: fields of `ParallelConfig`; without any, all ranks are data parallel.
        slow: leave it to `pytest -m slow`; a mark alone would not, for the processes run all of a file's tests that are
            alike in this.

    The test takes `groups`, the process groups of the layout, and may take `folder`, an empty folder that is the same
    on all ranks.
    """
    import pytest

    chosen = list(layouts) or [{}]
    launched = "WORLD_SIZE" in os.environ

    def decorate(function: Callable[..., None]) -> Any:
        file = inspect.getsourcefile(function)
        assert file is not None
        by_device = {device: [Case(function, layout, device, slow) for layout in chosen] for device in DEVICES}
        for device, cases in by_device.items():
            _cases.setdefault((file, world_size, device), []).extend(cases)

        @functools.wraps(function)
        def test(case: Case, request: pytest.FixtureRequest) -> None:
            if launched and int(os.environ["WORLD_SIZE"]) != world_size:
                pytest.skip(f"{case.id} needs {world_size} ranks, not {os.environ['WORLD_SIZE']}")
            if missing := _missing_gpus(case, world_size):
                pytest.skip(missing)
            if launched:
                try:
                    _run_case(case)
                except BaseException:  # with this process torchrun ends the others, which may wait for it
                    request.session.shouldfail = f"{case.name} failed on this rank"
                    raise
            else:
                problem = _outcome(file, world_size, case)
                assert not problem, problem

        del test.__wrapped__  # pytest would ask the original for its arguments
        # The first test of a file waits for all of them, with time limits of its own.
        test = pytest.mark.timeout(0)(test)
        if slow or (world_size > MANY_RANKS and not launched):
            test = pytest.mark.slow(test)
        parameters = [
            pytest.param(case, id=case.id, marks=[pytest.mark.gpu] if device == "cuda" else [])
            for device, cases in by_device.items()
            for case in cases
        ]
        return pytest.mark.parametrize("case", parameters)(test)

    return decorate


def layout_name(layout: Layout) -> str:
    """Return a short name such as "tp2-cp2"; "dp" when no size is given."""
    short = {
        "tensor_parallel_size": "tp",
        "context_parallel_size": "cp",
        "pipeline_parallel_size": "pp",
        "ring_size": "ring",
    }
    return "-".join(f"{short.get(name, name + '=')}{value}" for name, value in layout.items()) or "dp"


# In the process that runs pytest


def _missing_gpus(case: Case, world_size: int) -> str:
    """Return why this machine can't run `case` on GPUs, or ""."""
    if case.device == "cpu":
        return ""
    import torch

    needed = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return "" if found >= needed else f"{case.id} needs {needed} GPUs on this machine, which has {found}"


def _outcome(file: str, world_size: int, case: Case) -> str:
    """Return what went wrong in `case`, or ""; the first question about a file and size runs all its cases."""
    place = (file, world_size, case.device)
    known = _outcomes.setdefault(place, {})
    if case.name not in known:
        names = [other.name for other in _cases[place] if other.is_slow == case.is_slow]
        while names:
            known.update(_launch(file, world_size, case.device, names))
            names = [name for name in names if name not in known]
    return known[case.name]


def _launch(file: str, world_size: int, device: str, names: list[str]) -> dict[str, str]:
    """Run cases in new processes, in order; return the outcomes up to and including the first failure."""
    folder = Path(tempfile.mkdtemp(prefix="megacogvx-ranks-"))
    try:
        port = free_port()
        processes = [_start(file, device, names, rank, world_size, port, folder) for rank in range(world_size)]
        late = _wait(processes, START_SECONDS + CASE_SECONDS * len(names))
        passed = min((_passed(folder, rank) for rank in range(world_size)), key=len)
        outcomes = dict.fromkeys(passed, "")
        if len(passed) < len(names):
            outcomes[names[len(passed)]] = _explain(folder, processes, late)
        return outcomes
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start(
    file: str, device: str, names: list[str], rank: int, world_size: int, port: int, folder: Path
) -> BaseProcess:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {name: str(value) for name, value in {**place, **rendezvous}.items()}
    process = CONTEXTS[device].Process(target=_work, args=(file, device, folder, names, {**os.environ, **environment}))
    process.start()
    return process


def _wait(processes: list[BaseProcess], seconds: float) -> bool:
    """Wait for all, or until one fails or time is up, and end the rest; return whether time was up."""
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            codes = [process.exitcode for process in processes]
            if all(code == 0 for code in codes):
                return False
            if any(code not in (None, 0) for code in codes):
                time.sleep(1.0)  # let the others write why they fail, too
                return False
            time.sleep(0.05)
        return True
    finally:
        for process in processes:
            process.kill()
            process.join()


def _passed(folder: Path, rank: int) -> list[str]:
    file = folder / f"passed-{rank}"
    return file.read_text().splitlines() if file.exists() else []


def _explain(folder: Path, processes: list[BaseProcess], late: bool) -> str:
    parts = ["time is up"] if late else []
    for rank, process in enumerate(processes):
        lines = (folder / f"output-{rank}").read_text(errors="replace").splitlines()
        shown = "\n".join(lines[-LINES_SHOWN:])
        parts.append(f"--- rank {rank}, exit status {process.exitcode}:\n{shown}")
    return "\n".join(parts)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# In each rank


def _run_case(case: Case) -> None:
    """Make the process groups of the case's layout, run it, take them down."""
    from megacogvx.parallel import groups as parallel_groups
    from megacogvx.parallel.config import ParallelConfig

    if case.device == "cuda":
        _compute_in_fp32()
    groups = parallel_groups.initialize(
        ParallelConfig(**{"device": case.device, "timeout_minutes": 2.0, **case.layout})
    )
    folder = None
    if "folder" in inspect.signature(case.function).parameters:
        folder = Path(parallel_groups.broadcast_json(tempfile.mkdtemp(prefix="megacogvx-case-"), groups))
    try:
        case.function(groups, folder) if folder else case.function(groups)
        parallel_groups.barrier(groups)
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        parallel_groups.shutdown(stay_connected=True)


def _compute_in_fp32() -> None:
    """Keep TF32 away, whose 10 bits of mantissa no bound here allows.

    It is the default of convolutions, and in NVIDIA's images (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE) of products too.
    """
    import torch

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def _work(file: str, device: str, folder: Path, names: list[str], environment: dict[str, str]) -> None:
    """Run the cases in order; leave at the first that fails, since the other ranks may wait for this one in vain."""
    os.environ.update(environment)
    write_to(folder / f"output-{environment['RANK']}")
    faulthandler.dump_traceback_later(START_SECONDS, exit=True)
    _load(file)
    cases = {case.name: case for case in _cases[(file, int(environment["WORLD_SIZE"]), device)]}
    for name in names:
        faulthandler.dump_traceback_later(CASE_SECONDS, exit=True)
        try:
            _run_case(cases[name])
        except BaseException:  # torch's CheckpointException is no Exception
            print(f"in {name}:")
            traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        with (folder / f"passed-{environment['RANK']}").open("a") as passed:
            print(name, file=passed)


def write_to(file: Path) -> None:
    """Send all that this process writes, C++ included, to a file; one thread computes, as beside other ranks."""
    import torch

    with file.open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    torch.set_num_threads(1)


def _load(file: str) -> None:
    """Run a test file by its path; its decorators register its cases under the same path."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
