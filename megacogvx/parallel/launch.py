"""Who started this process, as which of how many, and on which device: read from the launcher's variables."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import torch

from megacogvx.errors import LaunchError
from megacogvx.log import get_logger
from megacogvx.parallel.config import ParallelConfig

logger = get_logger(__name__)


@dataclass(frozen=True)
class LaunchEnvironment:
    """Where this process stands among those that were started together."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def launch_environment() -> LaunchEnvironment:
    """Read which process of how many this is: torchrun's variables, else those of a Slurm step, else one process.

    Raises:
        LaunchError: only some of torchrun's variables are set.
    """
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        missing = [name for name in names if name not in os.environ]
        if missing:
            raise LaunchError(f"{', '.join(missing)} not set, though RANK or WORLD_SIZE is; start with torchrun")
        return LaunchEnvironment(*(int(os.environ[name]) for name in names))
    # Only a step that srun started has SLURM_STEP_NUM_TASKS; SLURM_NTASKS is set in the batch script as well, which
    # is one process.
    if "SLURM_STEP_NUM_TASKS" in os.environ and "SLURM_PROCID" in os.environ:
        tasks = _tasks_per_node(os.environ["SLURM_STEP_TASKS_PER_NODE"])
        return LaunchEnvironment(
            rank=int(os.environ["SLURM_PROCID"]),
            world_size=int(os.environ["SLURM_STEP_NUM_TASKS"]),
            local_rank=int(os.environ["SLURM_LOCALID"]),
            local_world_size=tasks[int(os.environ["SLURM_NODEID"])],
        )
    return LaunchEnvironment(0, 1, 0, 1)


def array_task() -> tuple[int, int]:
    """Return (place, number) of this task in a Slurm array job, whose tasks know nothing of each other; else (0, 1).

    The variables are those of https://slurm.schedmd.com/job_array.html.

    Raises:
        LaunchError: the array's numbers have gaps, so that a task's place isn't known.
    """
    if "SLURM_ARRAY_TASK_ID" not in os.environ:
        return 0, 1
    this, first, last, count, step = (
        int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", default))
        for name, default in (("ID", ""), ("MIN", ""), ("MAX", ""), ("COUNT", ""), ("STEP", "1"))
    )
    if (last - first) // step + 1 != count or (this - first) % step:
        raise LaunchError(
            f"the {count} tasks of this Slurm array from {first} to {last} have gaps; submit it as "
            f"--array=0-{count - 1}, or tell each its place"
        )
    return (this - first) // step, count


def check_world_size(config: ParallelConfig, world_size: int) -> None:
    """Check that `world_size` processes hold a whole number of replicas.

    Raises:
        LaunchError: they don't; names the sizes and the nearest number of processes that works.
    """
    replica = config.replica_size
    if world_size % replica == 0:
        return
    sizes = (
        f"parallel.tensor_parallel_size={config.tensor_parallel_size} x "
        f"parallel.context_parallel_size={config.context_parallel_size} x "
        f"parallel.pipeline_parallel_size={config.pipeline_parallel_size} = {replica} processes per replica"
    )
    if world_size < replica:
        raise LaunchError(f"{sizes}, but {world_size} started; start at least {replica}, or lower a size")
    near = world_size // replica * replica
    raise LaunchError(f"{sizes} don't divide the {world_size} started; start {near} or {near + replica}")


def choose_device(config: ParallelConfig, environment: LaunchEnvironment) -> torch.device:
    """Return this rank's device by `parallel.device`.

    Raises:
        LaunchError: "cuda" is asked for and this machine has fewer GPUs than local processes.
    """
    gpus = torch.cuda.device_count() if config.device != "cpu" and torch.cuda.is_available() else 0
    if gpus >= environment.local_world_size:
        return torch.device("cuda", environment.local_rank)
    if config.device == "cuda":
        raise LaunchError(
            f"parallel.device=cuda needs one GPU per process, but this machine has {gpus} for "
            f"{environment.local_world_size}; start fewer processes or set parallel.device=cpu"
        )
    if gpus:
        logger.warning(
            "the CPU is used: this process sees %d GPU(s) for the %d processes of its machine; start fewer, or let "
            "each see all of them (under Slurm --gpus-per-node, not --gpus-per-task)",
            gpus, environment.local_world_size,
        )  # fmt: skip
    return torch.device("cpu")


def _tasks_per_node(text: str) -> list[int]:
    """Expand Slurm's "4(x2),3" to [4, 4, 3]."""
    parts = (re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(","))
    return [int(part[1]) for part in parts if part for _ in range(int(part[2] or 1))]
