"""megatron-core's writer of one rank's tensors, in this process or in a child beside the training.

megatron-core plans the save together with the other ranks and gives back a request: a function that writes this
rank's files, and what has to be done when all ranks have written. The child is a fork: it sees the tensors as they
were at that moment while the training changes its own copy, so the training waits for the plan and, with a GPU, for
the copy to the host.

Rank 0 writes two small files of megatron-core's between collectives. An error there would leave the other ranks
waiting for it; it is kept until the collectives are done.
"""

from __future__ import annotations

import inspect
import logging
import multiprocessing
import queue
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megacogvx.checkpoint.directory import seal
from megacogvx.errors import CheckpointError
from megacogvx.parallel.groups import ParallelGroups

# It takes our small files, which lie there before the tensors, for an old checkpoint.
logging.getLogger(serialization.__name__).addFilter(lambda record: "Overwriting old" not in record.getMessage())

Entries = dict[str, dict[str, Any]]  # of the manifest, as plain values


WRITER_THREADS = 1  # files that each rank writes at a time
BACKEND, VERSION = "torch_dist", 1  # of megatron-core's format


def plan_write(
    state: dict[str, Any], folder: Path, groups: ParallelGroups, content: dict[str, Any], *, background: bool
) -> TensorWrite:
    """Decide with the other ranks who writes what, and begin; every rank calls it.

    Args:
        state: sharded tensors by name.
        folder: where to write, empty of tensors.
        groups: process groups; equal shards are shared out over data and context ranks.
        content: megatron-core's description of the state.
        background: write in a child from now on; else in `TensorWrite.wait`.

    Raises:
        CheckpointError: this rank could not write its small file; the others don't know of it.
    """
    problems: list[Exception] = []
    _use_plain_queue()
    _keep_common_errors(problems)
    writer = FullyParallelSaveStrategyWrapper(_ShardWriter(problems), groups.data_context_group, True)
    options: dict[str, Any] = {}
    if "async_strategy" in inspect.signature(serialization.save).parameters:
        options["async_strategy"] = "mcore"  # from 0.19 on the default is another package's
    request = serialization.save(
        state, str(folder), writer, content_metadata=content, async_sharded_save=True, **options
    )
    _raise_first(problems, folder)
    return TensorWrite(request, folder, background=background, problems=problems)


class TensorWrite:
    """The writing of this rank's tensors.

    Args:
        request: from `dist_checkpointing.save(..., async_sharded_save=True)`.
        folder: where it writes.
        background: in a child; else in `wait`.
        problems: where errors between collectives are kept.
    """

    def __init__(
        self, request: AsyncRequest, folder: Path, *, background: bool, problems: list[Exception] | None = None
    ) -> None:
        self._request, self._folder = request, folder
        self._problems = [] if problems is None else problems
        self._arguments = list(request.async_fn_args)
        self._child: Any = None
        if request.async_fn is not None:
            self._arguments[1] = request.preload_fn()  # the copy to the host
            if background:
                self._start()

    def is_done(self) -> bool:
        """Return whether this rank's child has finished, well or not; True where nothing runs."""
        return self._child is None or bool(self._receiver.poll())

    def wait(self) -> Entries:
        """Wait for the files; return their entries for the manifest. They are on disk.

        Raises:
            CheckpointError: they could not be written.
        """
        if self._request.async_fn is None:
            return {}
        if self._child is None:
            results, entries, problem = _write(self._request.async_fn, self._arguments, self._folder)
        else:
            results, entries, problem = self._receive()
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

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self._receiver, sender = context.Pipe(duplex=False)
        self._child = context.Process(
            target=_write_and_tell, args=(sender, self._request.async_fn, self._arguments, self._folder), name="writer"
        )
        self._child.start()
        sender.close()  # so that a child that dies is seen as the pipe's end

    def _receive(self) -> tuple[Any, Entries, str | None]:
        try:
            return self._receiver.recv()
        except EOFError:
            self._child.join()
            return None, {}, f"the process that wrote {self._folder} ended with status {self._child.exitcode}"
        finally:
            self._child.join()

    def _results(self) -> queue.Queue[Any]:
        return self._arguments[2]


class _ShardWriter(TorchDistSaveShardedStrategy):
    """megatron-core's writer of shards; an error of `.metadata`, on rank 0, is kept."""

    def __init__(self, problems: list[Exception]) -> None:
        super().__init__(BACKEND, VERSION, thread_count=WRITER_THREADS)
        self._problems = problems

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any) -> AsyncRequest:
        writer.finish = _keeping(writer.finish, self._problems)
        return super()._get_save_and_finalize_callbacks(writer, planned)


class _CommonWriter(TorchCommonSaveStrategy):
    """megatron-core's writer of `common.pt`; an error, on rank 0, is kept."""

    def __init__(self, problems: list[Exception]) -> None:
        super().__init__("torch", 1)
        self._problems = problems

    def save_common(self, *arguments: Any, **options: Any) -> None:
        _keeping(super().save_common, self._problems)(*arguments, **options)


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


def _use_plain_queue() -> None:
    """Let megatron-core hand its writer's results through a queue of this process.

    Its own lies in another process, which takes seconds to start and outlives a training that is killed; here results
    travel through the child's pipe.
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


def _write_and_tell(sender: Connection, function: Callable[..., None], arguments: list[Any], folder: Path) -> None:
    sender.send(_write(function, arguments, folder))
    sender.close()
