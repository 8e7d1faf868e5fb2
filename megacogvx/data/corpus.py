"""Corpus: several indexed datasets as one, with weights, and the config section `data`."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from megacogvx.config import Section
from megacogvx.data.indexed.layout import EncoderInfo, canonical_json, digest
from megacogvx.data.indexed.manifest import differing_keys
from megacogvx.data.indexed.reader import IndexedDataset
from megacogvx.data.indexed.remote import folder_at
from megacogvx.data.indexed.shard import Allocate, Record
from megacogvx.errors import ConfigError, DataError
from megacogvx.pack_layout import PackSample, place_sample, tokens_of
from megacogvx.patches import Triple

WEIGHT_STEPS = 10_000  # weights are rounded to this many parts of their sum, so that the blend is exact in integers
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
            corpus's samples, so that every step has equally many packs.
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


@dataclass(frozen=True)
class Group:
    """Consecutive corpus indices that are shuffled and repeated together, and their share in the blend."""

    start: int
    count: int
    weight: int


@dataclass(frozen=True)
class CorpusColumns:
    """What planning needs to know of every sample; arrays over corpus indices.

    Attributes:
        sample_id: uint64 keys.
        frames, height, width, text_length: int64; latent cells and text tokens.
        groups: how they are blended.
        checksum: changes with any change of the data or the weights, not with the scores.
        scores: side columns that thresholds ask for, float32.
    """

    sample_id: np.ndarray
    frames: np.ndarray
    height: np.ndarray
    width: np.ndarray
    text_length: np.ndarray
    groups: tuple[Group, ...]
    checksum: int = 0
    scores: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.sample_id)

    def lengths(self, patch: Triple) -> np.ndarray:
        """Return the tokens of every sample as int64 `[n]`; `tokens_of` is asked once per distinct size.

        Raises:
            DataError: a size doesn't divide by the patch.
        """
        keys = (self.frames << 32) | (self.height << 16) | self.width  # each fits 16 bits
        shapes, place = np.unique(keys, return_inverse=True)
        video = np.array([self._video_tokens(int(shape), keys, patch) for shape in shapes], np.int64)
        return video[place] + self.text_length

    def _video_tokens(self, shape: int, keys: np.ndarray, patch: Triple) -> int:
        try:
            return tokens_of(shape >> 32, shape >> 16 & 0xFFFF, shape & 0xFFFF, 0, patch)
        except DataError as error:
            first = int(self.sample_id[np.argmax(keys == shape)])
            raise DataError(f"sample {first}, the first of {int((keys == shape).sum())}: {error}") from None


class Corpus:
    """The datasets of a `DataConfig` as one.

    Attributes:
        datasets: in the order of the config.
        encoder: what made the records; equal for all of them.
        columns: what the planner needs.
    """

    def __init__(self, config: DataConfig) -> None:
        """Open the datasets of `config`.

        Raises:
            DataError: a dataset can't be opened, is empty, comes from another encoder than the first, or a sample id
                occurs twice.
        """
        folders = [folder_at(path if isinstance(path, str) else path[1]) for path in config.paths]
        if len({folder.resolve() for folder in folders}) < len(folders):
            listed = ", ".join(map(str, folders))
            raise ConfigError(f"data.paths names a folder twice: {listed}; change its weight instead")
        self.datasets = [IndexedDataset(folder, config.verify, config.access) for folder in folders]
        self.encoder: EncoderInfo = self.datasets[0].encoder
        for dataset in self.datasets:
            if not len(dataset):
                raise DataError(f"dataset {dataset.folder} has no samples")
            differing = differing_keys(self.encoder, dataset.encoder)
            if differing:
                raise DataError(
                    f"datasets {self.datasets[0].folder} and {dataset.folder} come from different encoders: "
                    f"{differing}; a model sees one kind: encode one of them again"
                )
        self._starts = np.cumsum([0, *map(len, self.datasets)]).tolist()
        weights = [None if isinstance(path, str) else path[0] for path in config.paths]
        self.columns = self._join(weights, sorted({threshold.column for threshold in config.thresholds}))
        self._check_ids()

    def __len__(self) -> int:
        return self._starts[-1]

    def sample(self, index: int, frames: range | None = None, first_frame: bool = False) -> Record:
        """Return the record of corpus index `index`, or the latent frames `frames` of it.

        Its first frame's pixels come with it where `first_frame` asks for them.

        Raises:
            DataError: the sample is damaged; names shard and sample.
        """
        dataset, number = self.locate(index)
        return dataset.sample(number, frames, first_frame)

    def sample_in(
        self, allocate: Allocate, index: int, frames: range | None = None, first_frame: bool = False
    ) -> Record:
        """Return `sample(index, frames, first_frame)` in memory of the caller; see `IndexedDataset.sample_in`."""
        dataset, number = self.locate(index)
        return dataset.sample_in(allocate, number, frames, first_frame)

    def read_into(self, index: int, out: np.ndarray, frames: range | None = None) -> int:
        """Copy latents and text of corpus index `index` into `out`; see `IndexedDataset.read_into`."""
        dataset, number = self.locate(index)
        return dataset.read_into(number, out, frames)

    def place(self, index: int, patch: Triple) -> PackSample:
        """Return the sample's entry of a pack's table, from the index alone."""
        columns = self.columns
        frames, height, width = int(columns.frames[index]), int(columns.height[index]), int(columns.width[index])
        return place_sample(
            int(columns.sample_id[index]), frames, height, width, int(columns.text_length[index]), patch
        )

    def where(self, index: int) -> str:
        """Name the sample of corpus index `index`: the file of its shard, its id and its place there."""
        dataset, number = self.locate(index)
        shard, row = dataset.locate(number)
        return shard.where(row)

    def locate(self, index: int) -> tuple[IndexedDataset, int]:
        """Return the dataset of corpus index `index` and the number of the sample there."""
        if not 0 <= index < len(self):
            raise IndexError(f"corpus index {index} of {len(self)}")
        place = bisect_right(self._starts, index) - 1
        return self.datasets[place], index - self._starts[place]

    def _join(self, weights: list[float | None], scored: list[str]) -> CorpusColumns:
        sizes = [len(dataset) for dataset in self.datasets]
        shares = integer_weights([weight for weight in weights if weight is not None])
        groups = tuple(map(Group, self._starts, sizes, shares)) if shares else (Group(0, len(self), 1),)
        identity = [[f"{dataset.manifest.checksum:016x}" for dataset in self.datasets], shares]
        names = ("sample_id", "frames", "height", "width", "text_length")
        columns = {name: np.concatenate([getattr(dataset, name) for dataset in self.datasets]) for name in names}
        scores = {name: np.concatenate([dataset.side_column(name) for dataset in self.datasets]) for name in scored}
        return CorpusColumns(**columns, groups=groups, checksum=digest(canonical_json(identity)), scores=scores)

    def _check_ids(self) -> None:
        ids, counts = np.unique(self.columns.sample_id, return_counts=True)
        if (counts > 1).any():
            twin = ids[counts > 1][0]
            places = [self.locate(int(index))[0].folder for index in np.flatnonzero(self.columns.sample_id == twin)]
            raise DataError(
                f"sample id {int(twin)} occurs {len(places)} times, in {', '.join(map(str, places[:2]))}: "
                "every draw of noise uses it, so it has to be unique; drop the copies"
            )


def integer_weights(weights: list[float]) -> list[int]:
    """Return small integers in the ratio of `weights`, each rounded to 1 / 10000 of their sum (but never to 0)."""
    total = sum(weights)
    scaled = [max(1, round(weight / total * WEIGHT_STEPS)) for weight in weights]
    divisor = math.gcd(*scaled) or 1
    return [value // divisor for value in scaled]
