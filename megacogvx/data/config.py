"""The config section `data`: which samples, by which scores, and how many of them make a step."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from megacogvx.config import Section

WeightedPath = tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], str]


class Threshold(Section):
    """What a sample's score has to be, from some step on; a sample without the score is left out.

    Attributes:
        column: name of a side column (`megacogvx data column`).
        minimum, maximum: bounds of the score, inclusive; None for no bound.
        from_step: first step for which samples are drawn by it; it replaces an earlier threshold of the same column.
    """

    column: str
    minimum: Annotated[float, Field(allow_inf_nan=False)] | None = None
    maximum: Annotated[float, Field(allow_inf_nan=False)] | None = None
    from_step: int = Field(default=0, ge=0)

    def admits(self, scores: np.ndarray) -> np.ndarray:
        """Return which of `scores` (float32 `[n]`, NaN for none) pass: bool `[n]`."""
        passed = ~np.isnan(scores)
        if self.minimum is not None:
            passed &= scores >= self.minimum
        if self.maximum is not None:
            passed &= scores <= self.maximum
        return passed


class DataConfig(Section):
    """Config section `data`: which samples, and how many of them make a step.

    Attributes:
        paths: dataset folders, or their URLs (`s3://...`), or `[weight, folder]` pairs. Without weights the datasets
            are one, every sample once per epoch; with weights each dataset gets its share of the samples, and is
            shuffled and repeated by itself.
        tokens_per_pack: token budget of a pack, text and video; a multiple of tensor x context ranks.
        packs_per_step: packs of one optimizer step, over all data-parallel ranks; a multiple of them.
        samples_per_step: the same as samples, in place of `packs_per_step`; converted once, by the mean length of the
            samples that are drawn, with the weights, so that every step has equally many packs.
        verify: compare checksums at every read, at the first read of a sample, or never.
        access: map the files, or read from them ("pread", for network file systems: a read that hangs can be given up);
            what lies at a URL is always read, by range requests.
        prefetch: steps that the loader's thread reads ahead.
        on_bad_sample: what can't be read keeps its place as zeros without loss and is counted; or it ends the run.
        max_bad_in_a_row: bad samples in a row, in the order of the plan, at which the run ends after all.
        read_timeout: seconds after which the read of a sample counts as stuck.
        buffer: tokens from which a step's packs are chosen, in steps; more balances better, and mixes epochs at their
            edge a little more.
        max_age: steps after which a sample that waits is sure to have been placed.
        thresholds: which scores samples need, by training step; all columns that have one must admit a sample.
    """

    paths: tuple[str | WeightedPath, ...]
    tokens_per_pack: int = Field(ge=1)
    packs_per_step: int = Field(default=1, ge=1)
    samples_per_step: int | None = Field(default=None, ge=1)
    verify: Literal["always", "once", "never"] = "always"
    access: Literal["mmap", "pread"] = "mmap"
    prefetch: int = Field(default=2, ge=1)
    on_bad_sample: Literal["leave_out", "stop"] = "leave_out"
    max_bad_in_a_row: int = Field(default=8, ge=1)
    read_timeout: float = Field(default=120.0, gt=0, allow_inf_nan=False)
    buffer: float = Field(default=2.0, ge=1.0, le=16.0)
    max_age: int = Field(default=8, ge=2)
    thresholds: tuple[Threshold, ...] = ()

    @field_validator("paths", mode="before")
    @classmethod
    def _one_folder(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @field_validator("thresholds")
    @classmethod
    def _one_at_a_time(cls, value: tuple[Threshold, ...]) -> tuple[Threshold, ...]:
        places = [(threshold.column, threshold.from_step) for threshold in value]
        if len(set(places)) < len(places):
            raise ValueError("two thresholds of one column begin at the same step; keep one of them")
        return value

    def active_thresholds(self, step: int) -> tuple[Threshold, ...]:
        """Return the threshold of each column that holds at `step`."""
        begun = sorted((t for t in self.thresholds if t.from_step <= step), key=lambda t: t.from_step)
        return tuple({threshold.column: threshold for threshold in begun}.values())

    def threshold_generation(self, step: int) -> int:
        """Return how often the thresholds have changed up to `step`."""
        return len({threshold.from_step for threshold in self.thresholds if 0 < threshold.from_step <= step})

    @field_validator("paths")
    @classmethod
    def _all_or_no_weights(cls, value: tuple[str | WeightedPath, ...]) -> tuple[str | WeightedPath, ...]:
        if not value:
            raise ValueError("name at least one dataset folder")
        if len({isinstance(path, str) for path in value}) > 1:
            raise ValueError("give every folder a weight, [weight, folder], or none")
        return value

    @model_validator(mode="after")
    def _packs_or_samples(self) -> DataConfig:
        if self.samples_per_step is not None and self.packs_per_step != 1:
            raise ValueError(
                f"packs_per_step={self.packs_per_step} and samples_per_step={self.samples_per_step} say the same in "
                "two ways; give one, and null for samples_per_step where the other file or override has it"
            )
        return self

    def in_packs(self, mean_tokens: float) -> DataConfig:
        """Return the section with `samples_per_step`, if it is given, turned into `packs_per_step`.

        Args:
            mean_tokens: mean length of the samples, text and video.
        """
        if self.samples_per_step is None:
            return self
        packs = max(1, round(self.samples_per_step * mean_tokens / self.tokens_per_pack))
        return self.model_copy(update={"packs_per_step": packs, "samples_per_step": None})
