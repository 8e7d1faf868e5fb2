"""Where a run stands: the few integers that, with (dataset, config, seed), decide everything that follows."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from megacogvx.errors import CheckpointError


@dataclass
class TrainState:
    """Progress of a run.

    Attributes:
        step: optimizer steps done; the next step has this number.
        samples, tokens: samples and used tokens seen so far, over all ranks.
        data: the loader's state.
        guard: what the guard remembers of the last steps.
        bad_samples: `FaultCounter.state()`: samples that couldn't be read, by reason.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    guard: dict[str, Any] = field(default_factory=dict)
    bad_samples: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for the checkpoint."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainState:
        """Read what `to_json` wrote.

        Raises:
            CheckpointError: a field is missing or unknown.
        """
        try:
            return cls(**values)
        except TypeError as error:
            raise CheckpointError(f"the checkpoint's training state doesn't fit this version: {error}") from None
