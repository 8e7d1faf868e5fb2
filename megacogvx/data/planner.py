"""PackPlan: which samples share which pack in step n, equal for any number of ranks and loader workers.

The samples come as an endless shuffled stream (`order.py`). A buffer of about two steps of them waits; each step takes
its packs from the buffer, the oldest first, full and balanced by cost (`balance.py`), and the rest waits on. Every
position of the stream is used exactly once: each sample once per epoch. Only the index columns are read, so every rank
computes the same plan for itself. A plan's state is the step, the next position of the stream, and the waiting
positions with their ages. (Packs of mixed resolution: CogVideoX paper, section 3.1, multi-resolution frame pack.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megacogvx.data.balance import Balancer, integer_costs
from megacogvx.data.config import DataConfig
from megacogvx.data.corpus import CorpusColumns
from megacogvx.data.order import SampleOrder
from megacogvx.draws import permutation
from megacogvx.errors import ConfigError, DataError
from megacogvx.log import get_logger
from megacogvx.patches import Triple

Step = tuple[tuple[int, ...], ...]
DRAIN_STEPS = 4  # steps in which a full buffer of protected samples is sure to be placed; see `_protected_age`
REMEMBERED = 16  # recent steps kept, since a loader and a report may ask for the same ones
logger = get_logger(__name__)


@dataclass
class _Buffer:
    """What waits before step `step`: stream positions, oldest first, and the steps at which they came."""

    step: int
    drawn: int
    positions: np.ndarray
    born: np.ndarray
    indices: np.ndarray


class PackPlan:
    """The packs of every step, from index columns, seed and config alone.

    Attributes:
        columns, config, seed, patch: as given.
        lengths: tokens of every sample, int64 `[n]`.
    """

    def __init__(
        self, columns: CorpusColumns, config: DataConfig, seed: int, patch: Triple,
        cost: tuple[float, float] = (1.0, 0.0),
    ) -> None:  # fmt: skip
        """Check the samples against the token budget and start before step 0.

        Args:
            columns: of the corpus.
            config: budget, packs of a step, buffer.
            seed: of the order.
            patch: latent cells per token (q, p, p).
            cost: (a, b) of a sample's cost a * L + b * L^2, L in tokens; only their ratio matters.

        Raises:
            DataError: a sample is longer than the budget, or doesn't divide by the patch.
            ConfigError: a cost is negative.
        """
        if min(cost) < 0 or sum(cost) <= 0:
            raise ConfigError(f"cost=(a, b)={cost}: both must be at least 0, and one above it")
        self.columns, self.config, self.seed, self.patch = columns, config, seed, patch
        self.lengths = columns.lengths(patch)
        self._total_length = int(self.lengths.sum())
        self._check_lengths()
        self._costs = integer_costs(self.lengths, *cost, config.tokens_per_pack)
        self._order = SampleOrder(columns.groups, seed)
        self._admitted: tuple[int, np.ndarray] = (-1, np.empty(0, bool))
        self._buffer = self._empty()
        self._recent: dict[int, Step] = {}

    def step(self, number: int) -> Step:
        """Return the corpus indices of every pack of step `number`.

        Asking for steps in order is cheap; an older one is computed from the beginning again.
        """
        assert number >= 0, number
        if number not in self._recent:
            if number < self._buffer.step:
                self._buffer = self._empty()
            while self._buffer.step <= number:
                self._advance()
        return self._recent[number]

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs to go on with the next step, ready for JSON."""
        return {
            "step": self._buffer.step,
            "seed": self.seed,
            "corpus": f"{self.columns.checksum:016x}",
            "drawn": self._buffer.drawn,
            "threshold_generation": self.config.threshold_generation(self._buffer.step),
            "waiting": [self._buffer.positions.tolist(), self._buffer.born.tolist()],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state()` was taken, without computing the steps before.

        Raises:
            DataError: the state is of another corpus or seed, or damaged.
        """
        expected = {"seed": self.seed, "corpus": f"{self.columns.checksum:016x}"}
        for name, value in expected.items():
            if state.get(name) != value:
                raise DataError(
                    f"the data state to resume from has {name}={state.get(name)}, this run has {value}: samples would "
                    "repeat or be left out; use the same data.paths, files and seed, or begin another run with "
                    "the weights of this one (training.start_from)"
                )
        try:
            positions, born = (np.array(column, np.int64).reshape(-1) for column in state["waiting"])
            step, drawn = int(state["step"]), int(state["drawn"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"the data state to resume from is damaged: {error!r}") from None
        if len(positions) != len(born) or (len(positions) and not 0 <= positions.min() <= positions.max() < drawn):
            raise DataError("the data state to resume from is damaged: its waiting samples don't fit together")
        self._buffer = _Buffer(step, drawn, positions, born, self._order.at(positions))
        self._recent = {}

    @property
    def epoch(self) -> float:
        """How often the stream has gone through the corpus, before the next step."""
        return (self._buffer.drawn - len(self._buffer.positions)) / len(self.columns)

    @property
    def oldest_age(self) -> int:
        """Steps that the longest waiting sample has waited, before the next step."""
        return int(self._buffer.step - self._buffer.born.min()) if len(self._buffer.born) else 0

    def _empty(self) -> _Buffer:
        nothing = np.empty(0, np.int64)
        return _Buffer(0, 0, nothing, nothing, nothing)

    def _advance(self) -> None:
        buffer = self._filled(self._buffer)
        ages = buffer.step - buffer.born
        balancer = Balancer(
            self.lengths[buffer.indices], self._costs[buffer.indices], buffer.indices, ages, self.config.packs_per_step,
            self.config.tokens_per_pack, self._protected_age,
        )  # fmt: skip
        packs = sorted(sorted(members) for members in balancer.run())
        assert all(packs), [len(members) for members in packs]
        # By age otherwise: the paper's uniform sampling of timesteps goes by place, which must say nothing of a sample.
        packs = [packs[place] for place in permutation(len(packs), self.seed, "pack order", buffer.step)]
        self._recent[buffer.step] = tuple(tuple(buffer.indices[members].tolist()) for members in packs)
        self._recent.pop(buffer.step - REMEMBERED, None)
        waiting = balancer.free
        self._buffer = _Buffer(
            buffer.step + 1, buffer.drawn, buffer.positions[waiting], buffer.born[waiting], buffer.indices[waiting]
        )

    def _filled(self, buffer: _Buffer) -> _Buffer:
        """Return `buffer` with samples drawn until it holds `config.buffer` steps of tokens.

        Samples that the step's thresholds don't admit are passed over, or leave the buffer. A corpus smaller than a
        step comes several times; a sample waits at most once per pack of the step, since no pack may hold it twice.
        """
        wanted = int(self.config.buffer * self.config.packs_per_step * self.config.tokens_per_pack)
        admitted = self._admits(buffer.step)
        stays = admitted[buffer.indices]
        indices, positions = buffer.indices[stays], buffer.positions[stays]
        missing = max(0, wanted - int(self.lengths[indices].sum()))
        chunk = max(8, 5 * missing * len(self.lengths) // (4 * self._total_length))  # a quarter more than needed
        held, drawn = len(indices), buffer.drawn
        while True:
            new = np.arange(drawn, drawn + chunk)
            drawn_indices = self._order.at(new)
            passed = admitted[drawn_indices]
            indices = np.concatenate([indices, drawn_indices[passed]])
            positions = np.concatenate([positions, new[passed]])
            drawn, chunk = drawn + chunk, 2 * chunk
            full = np.cumsum(self.lengths[indices]) - self.lengths[indices] >= wanted
            ended = full | (_copies_before(indices) >= self.config.packs_per_step)
            if ended[held:].any():
                count = held + int(np.argmax(ended[held:]))
                break
        born = np.concatenate([buffer.born[stays], np.full(count - held, buffer.step)])
        return _Buffer(buffer.step, int(positions[count]), positions[:count], born, indices[:count])

    def _admits(self, step: int) -> np.ndarray:
        """Return which samples the thresholds of `step` admit: bool `[n]`.

        Raises:
            DataError: none of them.
        """
        generation = self.config.threshold_generation(step)
        if self._admitted[0] != generation:
            admitted, active = np.ones(len(self.lengths), bool), self.config.active_thresholds(step)
            for threshold in active:
                admitted &= threshold.admits(self.columns.scores[threshold.column])
            listed = ", ".join(f"{t.column} in [{t.minimum}, {t.maximum}]" for t in active)
            if not admitted.any():
                raise DataError(f"data.thresholds of step {step} ({listed}) admit none of {len(admitted)} samples")
            if active:
                logger.info("from step %d on %d of %d samples: %s", step, admitted.sum(), len(admitted), listed)
            self._admitted = (generation, admitted)
        return self._admitted[1]

    @property
    def _protected_age(self) -> int:
        """Age from which a sample is dealt first and never put back.

        The oldest are dealt first into any pack with room, so at least half of every pack leaves the buffer: two steps
        of tokens are gone after `DRAIN_STEPS`.
        """
        return max(1, self.config.max_age - DRAIN_STEPS)

    def _check_lengths(self) -> None:
        budget, longest = self.config.tokens_per_pack, int(np.argmax(self.lengths))
        if self.lengths[longest] > budget:
            size = " x ".join(str(getattr(self.columns, name)[longest]) for name in ("frames", "height", "width"))
            count = int((self.lengths > budget).sum())
            raise DataError(
                f"{count} of {len(self.lengths)} samples don't fit data.tokens_per_pack={budget}; "
                f"the longest, sample {int(self.columns.sample_id[longest])} (latents {size}, "
                f"{int(self.columns.text_length[longest])} text tokens), has {self.lengths[longest]}; set "
                f"data.tokens_per_pack to at least {self.lengths[longest]}, or leave such samples out"
            )


def _copies_before(indices: np.ndarray) -> np.ndarray:
    """Return how many times each entry's value occurs before it."""
    order = np.argsort(indices, kind="stable")
    new = np.diff(indices[order], prepend=-1) != 0
    first = np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))
    copies = np.empty(len(order), np.int64)
    copies[order] = np.arange(len(order)) - first
    return copies
