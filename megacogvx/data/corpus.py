"""Corpus: several indexed datasets as one, with weights."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from megacogvx.data.config import DataConfig
from megacogvx.data.indexed.encoder_info import EncoderInfo
from megacogvx.data.indexed.layout import canonical_json, digest
from megacogvx.data.indexed.manifest import differing_keys
from megacogvx.data.indexed.reader import IndexedDataset
from megacogvx.data.indexed.record import Record
from megacogvx.data.indexed.remote import folder_at
from megacogvx.data.indexed.shard import Allocate
from megacogvx.errors import ConfigError, DataError
from megacogvx.pack_layout import PackSample, place_sample, tokens_of
from megacogvx.patches import Triple

# Weights are rounded to parts of their sum, so that the blend is exact in integers: to the first of these numbers of
# parts for which none is off by more than a thousandth. With the last, 9 * 10^10 samples may be drawn.
WEIGHT_STEPS = (10**4, 10**5, 10**6, 10**7, 10**8)
WEIGHT_ERROR = 1e-3


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

    def mean_length(self, patch: Triple) -> float:
        """Return the mean tokens of the samples that a run draws: of each group by its share of them, not its size."""
        lengths = self.lengths(patch)
        means = [float(lengths[group.start : group.start + group.count].mean()) for group in self.groups]
        return float(np.average(means, weights=[group.weight for group in self.groups]))

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
    """Return integers in the ratio of `weights`, each off by at most a thousandth of itself.

    The smallest, one below 10^-8 of their sum, may be off by more, but is never 0.
    """
    total = sum(weights)
    for steps in WEIGHT_STEPS:
        scaled = [max(1, round(weight / total * steps)) for weight in weights]
        parts = zip(scaled, weights, strict=True)
        if all(abs(value / steps - weight / total) <= WEIGHT_ERROR * weight / total for value, weight in parts):
            break
    divisor = math.gcd(*scaled) or 1
    return [value // divisor for value in scaled]
