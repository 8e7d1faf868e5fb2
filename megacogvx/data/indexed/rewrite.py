"""New datasets of old ones: merge (whole shards), split and filter (by record); sample ids stay what they are."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash

from megacogvx.data.indexed.durable import sync_folder
from megacogvx.data.indexed.layout import BIN_HEADER, IDX_HEADER
from megacogvx.data.indexed.manifest import MANIFEST, Manifest, differing_keys, finish_dataset
from megacogvx.data.indexed.reader import IndexedDataset
from megacogvx.data.indexed.remote import Folder
from megacogvx.data.indexed.side_columns import side_columns, write_side_column
from megacogvx.data.indexed.writer import DatasetWriter, shard_name
from megacogvx.errors import DataError
from megacogvx.log import progress

SAMPLES_PER_SHARD = 4096
HEADER_BYTES = max(BIN_HEADER.size, IDX_HEADER.size)


def merge_datasets(sources: Sequence[Path], folder: Path) -> Manifest:
    """Make one dataset of several: their shard files are linked (copied across file systems), not rewritten.

    A restart after an interruption goes on: shards are put there one by one, the manifest last. Side columns that every
    source has are joined; the others stay behind.

    Raises:
        DataError: the encoders differ, a sample id occurs twice, or `folder` is a dataset already.
    """
    _refuse_existing(folder)
    datasets = [IndexedDataset(source) for source in sources]
    homes = [_local(dataset.folder) for dataset in datasets]
    for dataset in datasets[1:]:
        differing = differing_keys(datasets[0].encoder, dataset.encoder)
        if differing:
            raise DataError(f"{datasets[0].folder} and {dataset.folder} come from different encoders: {differing}")
    ids = np.concatenate([dataset.sample_id for dataset in datasets])
    unique, counts = np.unique(ids, return_counts=True)
    if len(unique) < len(ids):
        raise DataError(f"sample id {int(unique[counts > 1][0])} occurs in more than one place; filter the copies out")
    folder.mkdir(parents=True, exist_ok=True)
    names: list[str] = []
    for home, dataset in zip(homes, datasets, strict=True):
        for shard in dataset.shards:
            names.append(shard_name(len(names)))
            for suffix in ("bin", "idx"):  # the .idx is the commit mark
                _place(home / f"{shard.name}.{suffix}", folder / f"{names[-1]}.{suffix}")
    sync_folder(folder)
    manifest = finish_dataset(folder, names)
    for name in set.intersection(*(set(side_columns(source)) for source in sources)):
        write_side_column(folder, name, np.concatenate([dataset.side_column(name) for dataset in datasets]), ids)
    return manifest


def _local(folder: Folder) -> Path:
    if isinstance(folder, Path):
        return folder
    raise DataError(f"{folder} is not on a file system here; copy it first, or train on both: data.paths blends")


def copy_samples(
    dataset: IndexedDataset, numbers: np.ndarray, folder: Path, samples_per_shard: int = SAMPLES_PER_SHARD
) -> Manifest:
    """Write samples `numbers` of `dataset` (int64, in this order), with their side columns, as a dataset of their own.

    Raises:
        DataError: there is none, one is damaged, `folder` is a dataset already, or another command began it.
    """
    _refuse_existing(folder)
    if not len(numbers):
        raise DataError(f"no sample of {dataset.folder} is left for {folder}")
    names: list[str] = []
    for start in progress(range(0, len(numbers), samples_per_shard), f"write {folder.name}"):
        with DatasetWriter(folder, dataset.encoder, len(names)) as writer:
            names.append(writer.name)
            part = numbers[start : start + samples_per_shard]
            if writer.finished:  # by an earlier, interrupted start
                writer.check_finished(dataset.sample_id[part].tolist())
                continue
            for number in part.tolist():
                record = dataset.sample(number, first_frame=True)
                writer.add_item(
                    latents=record.latents, text=record.text, sample_id=record.sample_id, metadata=record.metadata,
                    first_frame=record.first_frame,
                )  # fmt: skip
            writer.finalize()
    manifest = finish_dataset(folder, names)
    for name in side_columns(dataset.folder):
        with contextlib.suppress(DataError):  # a column of other samples, or a damaged one, stays behind
            write_side_column(folder, name, dataset.side_column(name)[numbers], dataset.sample_id[numbers])
    return manifest


def split_shares(sample_ids: np.ndarray, shares: Sequence[float]) -> list[np.ndarray]:
    """Deal samples to parts by a hash of their id: a sample's part stays the same when others come or go.

    Args:
        sample_ids: uint64 `[n]`.
        shares: of the parts, positive; they are scaled to a sum of 1.

    Returns:
        Per part the places of its samples, int64, ascending.
    """
    place = np.array([xxhash.xxh3_64_intdigest(b"split" + int(i).to_bytes(8, "little")) for i in sample_ids])
    ends = np.cumsum(shares) / sum(shares)
    part = np.searchsorted(ends[:-1], place / 2.0**64, side="right")
    return [np.flatnonzero(part == number) for number in range(len(shares))]


def _place(source: Path, target: Path) -> None:
    """Link or copy a file under a new name; shards never change, so that sharing them is safe."""
    if target.exists():
        if _is_copy(source, target):
            return
        raise DataError(f"{target} is there already and is another file; merge into a new folder")
    try:
        os.link(source, target)
    except OSError:
        beside = target.with_name(f"{target.name}.tmp")
        shutil.copyfile(source, beside)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(target)


def _is_copy(source: Path, target: Path) -> bool:
    """Whether both are the same shard's file: sizes may be equal by chance, the headers hold the shard's uuid."""
    if target.stat().st_size != source.stat().st_size:
        return False
    with source.open("rb") as one, target.open("rb") as other:
        return one.read(HEADER_BYTES) == other.read(HEADER_BYTES)


def _refuse_existing(folder: Path) -> None:
    if (folder / MANIFEST).exists():
        raise DataError(f"{folder} is a dataset already; name a new folder")
