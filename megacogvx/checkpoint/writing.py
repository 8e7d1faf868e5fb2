"""megatron-core's writer of one rank's tensors, in this process or in a child beside the training.

megatron-core plans the save together with the other ranks and gives back a request: a function that writes this
rank's files, and what has to be done when all ranks have written. The child is a fork: it sees the tensors as they
were at that moment while the training changes its own copy, so the training waits for the plan and, with a GPU, for
the copy to the host.
"""

from __future__ import annotations

import multiprocessing
import queue
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from megacogvx.checkpoint.directory import seal
from megacogvx.errors import CheckpointError

Entries = dict[str, dict[str, Any]]  # of the manifest, as plain values


class TensorWrite:
    """The writing of this rank's tensors.

    Args:
        request: from `dist_checkpointing.save(..., async_sharded_save=True)`.
        folder: where it writes.
        background: in a child; else in `wait`.
    """

    def __init__(self, request: AsyncRequest, folder: Path, *, background: bool) -> None:
        self._request, self._folder = request, folder
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
        """Write `.metadata`, once all ranks have written; every rank calls it."""
        for finalize in self._request.finalize_fns:
            finalize()

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
            return self._receiver.recv()  # type: ignore[no-any-return]
        except EOFError:
            self._child.join()
            return None, {}, f"the process that wrote {self._folder} ended with status {self._child.exitcode}"
        finally:
            self._child.join()

    def _results(self) -> queue.Queue[Any]:
        return self._arguments[2]  # type: ignore[no-any-return]


def use_plain_queue() -> None:
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
