"""Process groups, made once.

Tensor ranks are neighbours (they talk most), then context ranks, then data ranks, then pipeline stages (they talk
least); megatron-core's default order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megacogvx import log
from megacogvx.errors import AgreedError, LaunchError
from megacogvx.parallel.attempt import meet
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.launch import LaunchEnvironment, check_world_size, choose_device, launch_environment
from megacogvx.parallel.software import check_software

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

logger = log.get_logger(__name__)


@dataclass(frozen=True)
class ParallelGroups:
    """The process groups of a run and this rank's place in them.

    Attributes:
        collection: every group that megatron-core asks for; passed on as `pg_collection`.
        device: where this rank's tensors live.
        tensor, context, data, pipeline: (rank, size) along each axis; along `pipeline` a rank is a stage.
        rank, world_size: among all processes.
        ring: (rank, size) among the context ranks that exchange keys and values in a ring.
    """

    collection: ProcessGroupCollection
    device: torch.device
    tensor: tuple[int, int]
    context: tuple[int, int]
    data: tuple[int, int]
    pipeline: tuple[int, int]
    rank: int
    world_size: int
    ring: tuple[int, int] = (0, 1)

    @property
    def tensor_group(self) -> dist.ProcessGroup:
        """Ranks that share each linear layer, and under sequence parallelism the tokens."""
        return self.collection.tp

    @property
    def context_group(self) -> dist.ProcessGroup:
        """Ranks that share the tokens of one pack, or in a VAE run the frames of one clip."""
        return self.collection.cp

    @property
    def ulysses_group(self) -> dist.ProcessGroup:
        """Context ranks that exchange heads for tokens: neighbours, all of them without a ring."""
        return self.collection.cp if self.ring[1] == 1 else self.collection.hcp[0]

    @property
    def ring_group(self) -> dist.ProcessGroup:
        """Context ranks with the same heads and other tokens; there is none without a ring."""
        return self.collection.hcp[1]

    @property
    def data_group(self) -> dist.ProcessGroup:
        """Ranks that hold the same shard of the model and tokens, each with packs of its own."""
        return self.collection.dp

    @property
    def data_context_group(self) -> dist.ProcessGroup:
        """Ranks over which gradients and loss sums are added: data x context."""
        return self.collection.dp_cp

    @property
    def replica(self) -> tuple[int, int]:
        """(rank, size) among the ranks of one replica's stage: context ranks outer, tensor ranks inner."""
        return self.context[0] * self.tensor[1] + self.tensor[0], self.context[1] * self.tensor[1]

    @property
    def replica_group(self) -> dist.ProcessGroup:
        """Tensor x context ranks of a stage: those that sample one video together, in the order of `replica`."""
        return self.collection.tp_cp

    @property
    def pipeline_group(self) -> dist.ProcessGroup:
        """Ranks that hold the stages of one model, in order."""
        return self.collection.pp

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank's stage reads rows and embeds them."""
        return self.pipeline[0] == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank's stage returns rows, which the loss is made of."""
        return self.pipeline[0] == self.pipeline[1] - 1

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes the run's files."""
        return self.rank == 0

    @property
    def coordinates(self) -> str:
        """This rank's place for log lines: "dp0 pp0 cp0 tp1"."""
        return f"dp{self.data[0]} pp{self.pipeline[0]} cp{self.context[0]} tp{self.tensor[0]}"


def initialize(config: ParallelConfig, seed: int = 0) -> ParallelGroups:
    """Make the process groups of the run; call it once, before any model.

    One process that no launcher started becomes a world of one, without opening a port.

    Args:
        config: sizes of the axes.
        seed: seeds megatron-core's generators (dropout and recompute read them); draws of this project don't.

    Raises:
        LaunchError: too few processes, sizes that don't divide, no GPU for `parallel.device=cuda`, or the other
            processes can't be reached. The first three are raised before any group exists.
        ConfigError: a kernel or layer that is named can't be used on this machine; before any group exists, too.
    """
    if config.tensor_parallel_size > 1 and config.device != "cpu":
        # megatron-core's linear layers start an exchange before the product that it overlaps, and rely on a single
        # queue from host to GPU to keep that order (tensor_parallel/layers.py, 0.16.1). CUDA reads it when it starts.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    check_software(config)
    environment = launch_environment()
    check_world_size(config, environment.world_size)
    device = choose_device(config, environment)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _start(environment, device, timedelta(minutes=config.timeout_minutes))
    groups = _make_groups(config, environment, device, seed)
    log.set_rank(groups.rank, groups.coordinates)
    logger.info(
        "%d process(es) on %s: tensor %d x context %d x pipeline %d x data %d",
        groups.world_size, device.type, groups.tensor[1], groups.context[1], groups.pipeline[1], groups.data[1],
    )  # fmt: skip
    return groups


@contextmanager
def groups_of_a_program() -> Iterator[None]:
    """Take the process groups down at the end of a block, without a wait for the other ranks if this one fails.

    NCCL's groups are aborted then. Destroying them lets exchanges that have begun come to their end first (torch pull
    request 141510: "for a bad program, a hang is expected"): ranks that wait for this one would hold it, its error
    unsaid and its launcher knowing of nothing, until a timeout ends them all.
    """
    try:
        yield
    except AgreedError:  # every rank is here
        shutdown()
        raise
    except BaseException as error:
        if dist.is_initialized() and dist.get_world_size() > 1:
            logger.error("this rank fails: %s: %s", type(error).__name__, error)
            shutdown(abort=dist.get_backend() == "nccl")
        shutdown()
        raise
    shutdown()


def shutdown(*, stay_connected: bool = False, abort: bool = False) -> None:
    """Take the process groups down; a no-op when there are none.

    Args:
        stay_connected: keep the group of all processes, for another `initialize` with other sizes. A launcher's
            rendezvous serves once: processes that disconnected can't meet again.
        abort: NCCL's alone: break off the exchanges that other ranks have begun, instead of waiting for their end.
    """
    if not dist.is_initialized():
        return
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if abort:
        distributed_c10d._abort_process_group()  # of all groups at once, so that none waits for another
    elif not stay_connected:
        dist.destroy_process_group()
    log.set_rank(0, "")


def barrier(groups: ParallelGroups) -> None:
    """Wait until every rank has come here."""
    dist.barrier(device_ids=[groups.device.index] if groups.device.type == "cuda" else None)


def gather_json(value: Any, groups: ParallelGroups) -> list[Any]:
    """Return every rank's `value`, by rank, on every rank; they travel as JSON, never as pickles."""
    text = torch.tensor(bytearray(json.dumps(value).encode()), dtype=torch.uint8, device=groups.device)
    size = torch.tensor([text.numel()], device=groups.device)
    sizes = size.new_empty(groups.world_size)
    dist.all_gather_into_tensor(sizes, size)
    longest = int(sizes.max())
    texts = text.new_empty(groups.world_size * longest)
    dist.all_gather_into_tensor(texts, torch.nn.functional.pad(text, (0, longest - text.numel())))
    rows = texts.reshape(groups.world_size, longest).cpu()
    return [json.loads(bytes(row[:length].tolist())) for row, length in zip(rows, sizes.tolist(), strict=True)]


def broadcast_json(value: Any, groups: ParallelGroups) -> Any:
    """Return rank 0's `value` on every rank; it travels as JSON, never as a pickle."""
    return gather_json(value if groups.is_first else None, groups)[0]


def any_rank(condition: bool, groups: ParallelGroups) -> bool:
    """Return whether `condition` holds on any rank; every rank gets the same answer."""
    flag = torch.tensor([condition], dtype=torch.int32, device=groups.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def _start(environment: LaunchEnvironment, device: torch.device, timeout: timedelta) -> None:
    """Start the default process group: NCCL between GPUs, else gloo."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    place: dict[str, Any] = {"rank": environment.rank, "world_size": environment.world_size, "timeout": timeout}
    if device.type == "cuda":
        place["device_id"] = device
    if environment.world_size == 1 and "MASTER_PORT" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), **place)
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise LaunchError(
            f"{' and '.join(missing)} not set: {environment.world_size} processes need the first one's address and "
            "a free port; start with torchrun, or export them in the Slurm script"
        )
    try:
        store, _, _ = next(dist.rendezvous("env://", environment.rank, environment.world_size, timeout=timeout))
        store.set_timeout(timeout)
        attempt = meet(store, environment.rank, environment.world_size, timeout)
        dist.init_process_group(backend, store=dist.PrefixStore(attempt, store), **place)
    except dist.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise LaunchError(f"rank {environment.rank} can't join the others at {where}: {error}") from error


def _make_groups(
    config: ParallelConfig, environment: LaunchEnvironment, device: torch.device, seed: int
) -> ParallelGroups:
    from megacogvx.parallel import cpu, fused_adam

    cpu.enable_cpu(device)
    fused_adam.install()
    from megatron.core import parallel_state, tensor_parallel

    assert not parallel_state.is_initialized(), "process groups exist already; call shutdown() first"
    from megatron.core.process_groups_config import ProcessGroupCollection

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_parallel_size,
        context_parallel_size=config.context_parallel_size,
        pipeline_model_parallel_size=config.pipeline_parallel_size,
        # inner ranks first: those that exchange heads, then those that form a ring
        hierarchical_context_parallel_sizes=[config.ulysses_size, config.ring_size] if config.ring_size > 1 else None,
        # A language model shares its word embedding between first and last stage; no weight of ours is.
        get_embedding_ranks=_first_alone,
        get_position_embedding_ranks=_first_alone,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=config.timeout_minutes,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    collection = ProcessGroupCollection.use_mpu_process_groups()
    return ParallelGroups(
        collection=collection,
        device=device,
        tensor=(collection.tp.rank(), collection.tp.size()),
        context=(collection.cp.rank(), collection.cp.size()),
        data=(collection.dp.rank(), collection.dp.size()),
        pipeline=(collection.pp.rank(), collection.pp.size()),
        rank=environment.rank,
        world_size=environment.world_size,
        ring=(collection.hcp[1].rank(), config.ring_size) if config.ring_size > 1 else (0, 1),
    )


def _first_alone(ranks: list[int], *split: Any) -> list[int]:
    return ranks[:1]
