"""Write a dataset as a folder of safetensors files, or as WebDataset tars of them; `importers.py` reads both back."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch

from megacogvx.data.indexed.layout import canonical_json
from megacogvx.data.indexed.reader import IndexedDataset
from megacogvx.errors import DataError
from megacogvx.log import progress


def export_folder(dataset: IndexedDataset, folder: Path) -> int:
    """Write KEY.safetensors and KEY.json; returns the samples.

    The tensors: latents `[T, h, w, 2C]` and text `[L, E]` or ids `[L]`, in the dataset's dtypes, and first_frame uint8
    `[H, W, 3]` where a record has one.
    """
    _new(folder)
    folder.mkdir(parents=True)
    for key, tensors, facts in _files(dataset):
        (folder / f"{key}.safetensors").write_bytes(tensors)
        (folder / f"{key}.json").write_bytes(facts)
    return len(dataset)


def export_tars(dataset: IndexedDataset, folder: Path, samples_per_tar: int) -> int:
    """Write shard-00000.tar and so on, with the same two files a sample; returns the samples."""
    _new(folder)
    folder.mkdir(parents=True)
    archive: tarfile.TarFile | None = None
    for number, (key, tensors, facts) in enumerate(_files(dataset)):
        if number % samples_per_tar == 0:
            if archive is not None:
                archive.close()
            archive = tarfile.open(folder / f"shard-{number // samples_per_tar:05d}.tar", "w")  # noqa: SIM115
        assert archive is not None
        for suffix, data in (("safetensors", tensors), ("json", facts)):
            member = tarfile.TarInfo(f"{key}.{suffix}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    if archive is not None:
        archive.close()
    return len(dataset)


def _files(dataset: IndexedDataset) -> Iterator[tuple[str, bytes, bytes]]:
    for number in progress(range(len(dataset)), "export"):
        record = dataset.sample(number, first_frame=True)
        tensors = {"latents": record.latents.contiguous(), "text": record.text.contiguous()}
        if record.first_frame is not None:
            tensors["first_frame"] = record.first_frame.contiguous()
        yield f"{record.sample_id:016x}", safetensors.torch.save(tensors), canonical_json(record.metadata)


def _new(folder: Path) -> None:
    if folder.exists():
        raise DataError(f"{folder} exists already; export into a new folder")
