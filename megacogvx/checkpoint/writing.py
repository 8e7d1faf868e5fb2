"""megatron-core's writer of one rank's tensors: at once, or in a thread beside the training.

megatron-core plans the save together with the other ranks and gives back a request: a function that writes this
rank's files, and what has to be done when all ranks have written. A thread writes copies of the tensors, so the
training waits for the plan and the copy alone. A forked child would need no copy of what lies on the host, but from
the fork on the training pays for each page that it changes, which took ten times as long as the copy; and a child
keeps the sockets of a rank that was killed open, so that its peers notice late.

Rank 0 writes two small files of megatron-core's between collectives. An error there would leave the other ranks
waiting for it; it is kept until the collectives are done.
"""

from __future__ import annotations

import inspect
import logging
import queue
import threading
from collections.abc import Callable, Container
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.metadata import Metadata

from megacogvx.checkpoint.manifest import seal
from megacogvx.checkpoint.run_state import tensors_of
from megacogvx.errors import CheckpointError
from megacogvx.parallel.groups import ParallelGroups, any_rank

# It takes our small files, which lie there before the tensors, for an old checkpoint.
logging.getLogger(serialization.__name__).addFilter(lambda record: "Overwriting old" not in record.getMessage())

Entries = dict[str, dict[str, Any]]  # of the manifest, as plain values


WRITER_THREADS = 1  # files that each rank writes at a time
BACKEND, VERSION = "torch_dist", 1  # of megatron-core's format


class SavePlans:
    """Who writes which tensor at which place, remembered from save to save; every rank of a run keeps one.

    megatron-core plans a save in exchanges between all ranks, whose size grows with tensors and ranks. While every
    rank's tensors keep their names and shapes, the plan of the second save holds for all later ones.
    """

    def __init__(self) -> None:
        self._writer: FullyParallelSaveStrategyWrapper | None = None
        self._planned: list[Any] = []

    def forget(self) -> None:
        """Plan the next save anew: the last one broke off, and not on every rank at the same place."""
        self._writer = None

    def writer(
        self, state: dict[str, Any], groups: ParallelGroups, problems: list[Exception]
    ) -> tuple[FullyParallelSaveStrategyWrapper, bool]:
        """Return megatron-core's writer for these tensors, and whether it has written their like before."""
        asked = [
            (tensor.key, tensor.global_offset, tensor.local_shape, tensor.global_shape, tensor.dtype, tensor.replica_id)
            for tensor in tensors_of(state)
        ]
        is_new = any_rank(self._writer is None or asked != self._planned, groups)
        if is_new:
            shards = _ShardWriter(problems)
            self._writer = FullyParallelSaveStrategyWrapper(shards, groups.data_context_group, True)
            self._planned = asked
        assert self._writer is not None
        self._writer.base_strategy.problems = problems
        return self._writer, not is_new


def plan_write(
    state: dict[str, Any], folder: Path, groups: ParallelGroups, content: dict[str, Any], plans: SavePlans, *,
    background: bool,
) -> TensorWrite:  # fmt: skip
    """Decide with the other ranks who writes what, and copy it; every rank calls it.

    Args:
        state: sharded tensors by name.
        folder: where to write, empty of tensors.
        groups: process groups; equal shards are shared out over data and context ranks.
        content: megatron-core's description of the state.
        plans: of the run's earlier saves.
        background: write copies of the tensors from `TensorWrite.start` on; else the tensors, in `TensorWrite.wait`.

    Raises:
        CheckpointError: this rank could not write its small file; the others don't know of it.
    """
    problems: list[Exception] = []
    _use_plain_queue()
    _keep_common_errors(problems)
    writer, is_known = plans.writer(state, groups, problems)
    options: dict[str, Any] = {"validate_access_integrity": not is_known}
    if "async_strategy" in inspect.signature(serialization.save).parameters:
        options["async_strategy"] = "mcore"  # from 0.19 on the default is another package's
    request = serialization.save(
        state, str(folder), writer, content_metadata=content, async_sharded_save=True, **options
    )
    _raise_first(problems, folder)
    live = {_storage(tensor.data) for tensor in tensors_of(state)} if background else set()
    return TensorWrite(request, folder, background=background, problems=problems, live=live)


class TensorWrite:
    """The writing of this rank's tensors.

    Args:
        request: from `dist_checkpointing.save(..., async_sharded_save=True)`.
        folder: where it writes.
        background: in a thread; else in `wait`.
        problems: where errors between collectives are kept.
        live: addresses of the memory that the training goes on to change.
    """

    def __init__(
        self, request: AsyncRequest, folder: Path, *, background: bool, problems: list[Exception] | None = None,
        live: Container[int] = (),
    ) -> None:  # fmt: skip
        self._request, self._folder = request, folder
        self._problems = [] if problems is None else problems
        self._arguments = list(request.async_fn_args)
        self._thread: threading.Thread | None = None
        self._written: tuple[Any, Entries, str | None] = (None, {}, "it was not written")
        if request.async_fn is not None:
            self._arguments[1] = _apart(request.preload_fn(), live)  # the copy to the host, or on it
            if background:
                self._thread = threading.Thread(target=self._write_now, name="checkpoint-writer", daemon=True)

    def start(self) -> None:
        """Begin to write in the background, once all ranks are known to have planned."""
        if self._thread is not None:
            self._thread.start()

    def is_done(self) -> bool:
        """Return whether this rank's thread has finished, well or not; True where nothing runs."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> Entries:
        """Wait for the files; return their entries for the manifest. They are on disk.

        Raises:
            CheckpointError: they could not be written.
        """
        if self._request.async_fn is None:
            return {}
        if self._thread is None:
            self._write_now()
        else:
            self._thread.join()
        results, entries, problem = self._written
        if problem:
            raise CheckpointError(problem)
        self._results().put(results)
        return entries

    def finish(self) -> None:
        """Write `.metadata`, once all ranks have written; every rank calls it.

        Raises:
            CheckpointError: this rank could not write it; the others don't know of it.
        """
        self._request.finalize_fns[0]()  # the second writes metadata.json, without a thought for the other ranks
        _raise_first(self._problems, self._folder)

    def _write_now(self) -> None:
        assert self._request.async_fn is not None
        self._written = _write(self._request.async_fn, self._arguments, self._folder)
        self._arguments[1] = []  # the copies

    def _results(self) -> queue.Queue[Any]:
        return self._arguments[2]


class _ShardWriter(TorchDistSaveShardedStrategy):
    """megatron-core's writer of shards; an error of `.metadata`, on rank 0, is kept."""

    def __init__(self, problems: list[Exception]) -> None:
        super().__init__(BACKEND, VERSION, thread_count=WRITER_THREADS, cached_metadata=True)
        self.problems = problems

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any) -> AsyncRequest:
        writer.finish = _keeping(partial(_finish, writer.finish), self.problems)
        request = super()._get_save_and_finalize_callbacks(writer, planned)
        if request.async_fn is None:
            return request
        return request._replace(async_fn=partial(_write_shards, request.async_fn.args[0]))


class _CommonWriter(TorchCommonSaveStrategy):
    """megatron-core's writer of `common.pt`; an error, on rank 0, is kept."""

    def __init__(self, problems: list[Exception]) -> None:
        super().__init__("torch", 1)
        self._problems = problems

    def save_common(self, *arguments: Any, **options: Any) -> None:
        _keeping(super().save_common, self._problems)(*arguments, **options)


def _finish(finish: Callable[..., None], metadata: Metadata, results: Any) -> None:
    """Write `.metadata` without megatron-core's memory of how it was planned, on all ranks."""
    vars(metadata).pop("all_local_plans", None)
    finish(metadata, results)


def _write_shards(transforms: list[Any], rank: int, buckets: list[Any], results: queue.Queue[Any]) -> None:
    """Write the files of one rank in this very process.

    megatron-core's own function starts one more process for each file, and waits for ever for one that was killed.
    """
    # Made for a child, it turns the garbage collection of its process off.
    write = inspect.unwrap(filesystem_async.FileSystemWriterAsync.write_preloaded_data)
    written = {}
    for number, bucket in enumerate(buckets):
        answers: queue.Queue[Any] = queue.Queue()
        begun: queue.Queue[Any] = queue.Queue()
        begun.put(number)
        write(transforms, number, bucket, answers, begun, True)
        _, written[number] = answers.get_nowait()
        if isinstance(written[number], Exception):
            raise written[number]
    results.put(written)


def _keep_common_errors(problems: list[Exception]) -> None:
    assert hasattr(serialization, "get_default_save_common_strategy"), "megatron-core writes common.pt in another way"
    serialization.get_default_save_common_strategy = lambda: _CommonWriter(problems)


def _keeping(function: Callable[..., None], problems: list[Exception]) -> Callable[..., None]:
    """Wrap `function` so that its errors go to `problems`."""

    def kept(*arguments: Any, **options: Any) -> None:
        try:
            function(*arguments, **options)
        except Exception as error:
            problems.append(error)

    return kept


def _raise_first(problems: list[Exception], folder: Path) -> None:
    if problems:
        raise CheckpointError(f"{folder} can't be written: {type(problems[0]).__name__}: {problems[0]}")


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _apart(buckets: list[Any], live: Container[int]) -> list[Any]:
    """Return megatron-core's (path, name, (objects, [(item, tensor), ...])) with copies of the tensors that are live.

    Those that lay on a GPU, or were parts of others, it has copied already.
    """
    return [
        (path, name, (objects, [(item, _copied(tensor, live)) for item, tensor in tensors]))
        for path, name, (objects, tensors) in buckets
    ]


def _copied(tensor: torch.Tensor, live: Container[int]) -> torch.Tensor:
    return tensor.clone() if _storage(tensor) in live else tensor


def _use_plain_queue() -> None:
    """Let megatron-core hand its writer's results through a queue of this process.

    Its own lies in another process, which takes seconds to start and outlives a training that is killed.
    """
    assert hasattr(filesystem_async, "_results_queue"), "megatron-core's writer hands results over in another way"
    filesystem_async._results_queue = queue.Queue()


def _write(function: Callable[..., None], arguments: list[Any], folder: Path) -> tuple[Any, Entries, str | None]:
    """Write the files of one rank and hash them; return (megatron-core's results, entries, what went wrong)."""
    try:
        function(*arguments)
        results = arguments[2].get_nowait()
        if isinstance(results, Exception):
            raise results
        return results, {name: vars(seal(folder, name)) for _, name, _ in arguments[1]}, None
    except Exception as error:
        return None, {}, f"{folder} can't be written: {type(error).__name__}: {error}"
