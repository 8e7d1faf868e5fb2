"""PackLoader: the packs of one data-parallel rank, step after step, read ahead in a thread.

Its state is the plan's, as of the step that comes next for the consumer (never of what the thread has read ahead), so a
run resumes to the exact sample on any number of ranks.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from megacogvx.data.corpus import Corpus
from megacogvx.data.faults import GuardedReader
from megacogvx.data.indexed.record import Record
from megacogvx.data.indexed.shard import Allocate
from megacogvx.data.pack import WHOLE, Cut, Pack, planned_layout, read_pack
from megacogvx.data.planner import PackPlan
from megacogvx.errors import ConfigError, DataError, LaunchError
from megacogvx.pack_layout import PackLayout

POLL_SECONDS = 0.1  # how often a waiting thread looks whether it should end
JOIN_SECONDS = 10.0


@dataclass(frozen=True)
class _Loaded:
    packs: list[Pack]
    layouts: list[PackLayout]
    state_after: dict[str, Any]


class PackLoader:
    """Iterates over steps; each gives the packs of this rank: places data_rank, data_rank + data_size, ...

    Ranks that share a pack (tensor, context) make loaders with the same `data_rank` and get equal packs.
    Close it, or use it as a context manager; a loader that is dropped ends its thread as well.

    Attributes:
        layouts: of all packs of the step that was returned last, by place, those of the other ranks among them; what
            is decided over a whole step (timesteps) needs no communication.
    """

    def __init__(
        self, corpus: Corpus, plan: PackPlan, data_rank: int = 0, data_size: int = 1, start_step: int = 0,
        state: dict[str, Any] | None = None, prefetch: int | None = None, cut: Cut = WHOLE, with_images: bool = False,
        allocate: Allocate | None = None, vocabulary: int | None = None,
    ) -> None:  # fmt: skip
        """Start reading.

        Args:
            corpus: where samples are read.
            plan: made from `corpus.columns`; the loader uses it from now on, make another one for other purposes.
            data_rank, data_size: this rank's place among the data-parallel ranks, and their number.
            start_step: the first step; the ones before are planned, not read.
            state: from `state()` of an earlier loader, to start there at once; `start_step`: 0, or its step.
            prefetch: steps to read ahead; None takes `data.prefetch`.
            cut: this rank's place among those that share a pack; only the frames that its tokens need are read.
            with_images: read the first frames' pixels too.
            allocate: gives the memory that samples are copied into; None: pinned memory where there is a GPU, else
                mapped files are not copied at all.
            vocabulary: texts are token ids, and a sample with one that isn't below this is a damaged one.

        Raises:
            ConfigError: the packs of a step don't divide by the ranks.
            DataError: `state` is of other data or of another step.
        """
        packs = plan.config.packs_per_step
        if packs % data_size:
            raise ConfigError(
                f"data.packs_per_step={packs} doesn't divide by {data_size} data-parallel ranks; sizes that work: "
                f"{packs // data_size * data_size or data_size}, {-(-packs // data_size) * data_size}"
            )
        assert 0 <= data_rank < data_size, (data_rank, data_size)
        if state is not None:
            plan.restore(state)
            if start_step and plan.state()["step"] != start_step:
                raise DataError(
                    f"the data state to resume from is of step {state['step']}, the run goes on at {start_step}: "
                    "they are of different checkpoints"
                )
        elif start_step:
            plan.step(start_step - 1)
        self._state = plan.state()
        depth = plan.config.prefetch if prefetch is None else prefetch
        self._queue: queue.Queue[_Loaded | BaseException] = queue.Queue(maxsize=max(1, depth))
        if allocate is None and torch.cuda.is_available():
            allocate = _pinned
        source = _Source(corpus, plan, range(data_rank, packs, data_size), cut, with_images, allocate, vocabulary)
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=_read_ahead,
            args=(source, self._state["step"], self._queue, self._stop),
            name="pack-loader",
            daemon=True,
        )
        weakref.finalize(self, _end, self._stop, self._thread)
        self._error: BaseException | None = None
        self.layouts: list[PackLayout] = []
        self._thread.start()

    def __iter__(self) -> Iterator[list[Pack]]:
        return self

    def __next__(self) -> list[Pack]:
        """Return this rank's packs of the next step.

        Raises:
            DataError: the dataset isn't the one that was planned, or with data.on_bad_sample=stop a sample is damaged;
                every later call raises it again.
            StopIteration: the loader was closed.
        """
        if self._error is not None:
            raise self._error
        loaded = self._take()
        if isinstance(loaded, BaseException):
            self._error = loaded
            raise loaded
        self._state, self.layouts = loaded.state_after, loaded.layouts
        return loaded.packs

    def __enter__(self) -> PackLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def next_step(self) -> int:
        """The step that comes next."""
        return int(self._state["step"])

    def state(self) -> dict[str, Any]:
        """Return the state before the next step, ready for JSON; equal on all ranks."""
        return self._state

    def close(self) -> None:
        """End the thread and drop what it has read."""
        _end(self._stop, self._thread)
        while not self._queue.empty():
            self._queue.get_nowait()

    def _take(self) -> _Loaded | BaseException:
        while not self._stop.is_set():
            try:
                return self._queue.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if not self._thread.is_alive() and self._queue.empty():
                    return LaunchError(
                        "the loader's thread has ended without a word; was this process forked after it?"
                    )
        raise StopIteration


def _end(stop: threading.Event, thread: threading.Thread) -> None:
    """End the thread and wait for it: one inside torch when the interpreter goes down would abort the process."""
    stop.set()
    if thread is not threading.current_thread():  # a dropped loader may be collected there
        thread.join(JOIN_SECONDS)


@dataclass(frozen=True)
class _Source:
    """What the thread reads: these places of each step's packs, for one rank."""

    corpus: Corpus
    plan: PackPlan
    places: range
    cut: Cut
    with_images: bool
    allocate: Allocate | None
    vocabulary: int | None


def _read_ahead(source: _Source, step: int, out: queue.Queue[_Loaded | BaseException], stop: threading.Event) -> None:
    """Put the packs of each step into `out`, or the error that ended it; holds no reference to the loader."""
    guarded = GuardedReader(source.plan.config.read_timeout)
    try:
        while not stop.is_set():
            item: _Loaded | BaseException
            try:
                item = _load_step(source, guarded, step)
            except BaseException as error:  # whatever it is, the consumer has to hear of it
                item = error
            while not stop.is_set():
                try:
                    out.put(item, timeout=POLL_SECONDS)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
            step += 1
    finally:
        guarded.close()


def _load_step(source: _Source, guarded: GuardedReader, step: int) -> _Loaded:
    corpus, plan = source.corpus, source.plan

    def read(index: int, frames: range | None, first_frame: bool) -> Record:
        def sample() -> Record:
            if source.allocate is None:
                record = corpus.sample(index, frames, first_frame)
            else:
                record = corpus.sample_in(source.allocate, index, frames, first_frame)
            _check_ids(record, source.vocabulary, lambda: corpus.where(index))
            return record

        if plan.config.on_bad_sample == "stop":
            return sample()
        return guarded(sample, corpus.where(index))

    planned, num_tokens = plan.step(step), plan.config.tokens_per_pack
    layouts = [planned_layout(corpus, indices, plan.patch, num_tokens) for indices in planned]
    packs = [
        read_pack(
            corpus, planned[place], plan.patch, num_tokens, step, place, source.cut, read, source.with_images,
            layouts[place],
        )
        for place in source.places
    ]  # fmt: skip
    return _Loaded(packs, layouts, plan.state())


def _check_ids(record: Record, vocabulary: int | None, where: Callable[[], str]) -> None:
    """Refuse token ids that the text encoder doesn't know here: inside a step one rank alone would fail."""
    if vocabulary is None or not len(record.text):
        return
    least, most = (int(value) for value in record.text.aminmax())
    if least < 0 or most >= vocabulary:
        raise DataError(
            f"{where()} has token ids {least} to {most}, the text encoder knows 0 to {vocabulary - 1}; "
            "name the encoder whose tokenizer wrote the dataset (text.encoder)"
        )


def _pinned(size: int) -> torch.Tensor:
    """Return pinned memory, from which a copy to the GPU doesn't wait; torch keeps what is given back for the next."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)
