"""Read every byte of a dataset once and list everything that is wrong, instead of stopping at the first."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megacogvx.data.indexed.manifest import differing_keys, read_manifest
from megacogvx.data.indexed.remote import Folder, RemotePath, folder_at
from megacogvx.data.indexed.shard import Shard
from megacogvx.errors import DataError
from megacogvx.log import progress


@dataclass
class VerifyReport:
    """What `verify_dataset` found.

    Attributes:
        folder: the dataset.
        shards, samples, bytes: how much was read.
        problems: one line each, naming file and sample.
        notes: harmless leftovers, such as temporary files of a killed writer.
    """

    folder: Folder
    shards: int = 0
    samples: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify_dataset(folder: Folder | str) -> VerifyReport:
    """Check the manifest, every shard's index, every record's header and every checksum of `folder`.

    Returns:
        The report; nothing is raised for damage.
    """
    report = VerifyReport(folder_at(folder))
    try:
        manifest = read_manifest(report.folder)
    except DataError as error:
        report.problems.append(str(error))
        return report
    ids: list[np.ndarray] = []
    for entry in progress(manifest.shards, "verify shards"):
        try:
            shard = Shard(report.folder, entry.name, "always", entry)
        except DataError as error:
            report.problems.append(str(error))
            continue
        differing = differing_keys(manifest.encoder, shard.index.encoder)
        if differing:
            report.problems.append(f"shard {entry.name} comes from another encoder than the manifest says: {differing}")
        ids.append(shard.index.columns["sample_id"])
        _verify_records(shard, report)
    _verify_ids(ids, report)
    _note_leftovers(report, {entry.name for entry in manifest.shards})
    return report


def _verify_records(shard: Shard, report: VerifyReport) -> None:
    for row in range(len(shard.index)):
        try:
            shard.check_record_header(row)
            shard.record(row, first_frame=True).metadata  # noqa: B018  parsing is the check
        except DataError as error:
            report.problems.append(str(error))
    report.shards += 1
    report.samples += len(shard.index)
    report.bytes += shard.index.bin_bytes + shard.index.idx_bytes


def _verify_ids(ids: list[np.ndarray], report: VerifyReport) -> None:
    unique, counts = np.unique(np.concatenate([np.empty(0, np.uint64), *ids]), return_counts=True)
    report.problems += [
        f"{report.folder}: sample id {int(twin)} occurs {int(count)} times; ids are unique in a dataset"
        for twin, count in zip(unique[counts > 1], counts[counts > 1], strict=True)
    ]


def _note_leftovers(report: VerifyReport, names: set[str]) -> None:
    for path in _listed(report.folder, "*.tmp"):
        report.notes.append(f"{path.name} is left from a writer that was interrupted (or is still at work)")
    for path in _listed(report.folder, "*.idx"):
        if path.stem not in names:
            report.notes.append(f"shard {path.stem} is finished but not in the manifest; finish_dataset takes it in")


def _listed(folder: Folder, pattern: str) -> list[Path] | list[RemotePath]:
    return sorted(folder.glob(pattern), key=str)  # type: ignore[return-value]
