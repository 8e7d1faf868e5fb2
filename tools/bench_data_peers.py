"""Other formats as `bench_data.py` reads them: each is written with the same samples and read by its own public reader.

A reader is called with a sample's number and a buffer of bytes, and copies latents and text into it, as ours does; what
its library returns is left as it comes (arrays, tensors, bytes), without a conversion that the copy doesn't need. None
of them compares a checksum here.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megacogvx.data.indexed import IndexedDataset

Reader = Callable[[int, np.ndarray], None]


def parts_of(folder: Path) -> Iterator[tuple[bytes, bytes]]:
    """Yield the latents and the text of every sample as bytes."""
    dataset = IndexedDataset(folder, "never")
    for number in range(len(dataset)):
        record = dataset.sample(number)
        yield tuple(t.view(torch.uint8).numpy().tobytes() for t in (record.latents, record.text))  # type: ignore[misc]


def fill(buffer: np.ndarray, *parts: Any) -> None:
    """Copy bytes-like parts into `buffer`, one after the other."""
    done = 0
    for part in parts:
        array = part.view(np.uint8) if isinstance(part, np.ndarray) else np.frombuffer(part, np.uint8)
        buffer[done : done + len(array)] = array
        done += len(array)


def safetensors_files(folder: Path) -> Reader:
    """safetensors, a file per sample."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    (folder / "peer").mkdir()
    for number, parts in enumerate(parts_of(folder)):
        arrays = dict(zip(("latents", "text"), (np.frombuffer(part, np.uint8) for part in parts), strict=True))
        save_file(arrays, folder / f"peer/{number}.safetensors")

    def read(number: int, buffer: np.ndarray) -> None:
        with safe_open(folder / f"peer/{number}.safetensors", "np") as file:
            fill(buffer, file.get_tensor("latents"), file.get_tensor("text"))

    return read


def safetensors_one(folder: Path) -> Reader:
    """safetensors, all samples in one file that stays open."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors = {
        f"{number}.{part}": torch.frombuffer(bytearray(data), dtype=torch.uint8)
        for number, parts in enumerate(parts_of(folder))
        for part, data in enumerate(parts)
    }
    save_file(tensors, folder / "peer.safetensors")
    file = safe_open(folder / "peer.safetensors", "pt").__enter__()

    def read(number: int, buffer: np.ndarray) -> None:
        fill(buffer, *(file.get_tensor(f"{number}.{part}").numpy() for part in (0, 1)))

    return read


def megatron(folder: Path) -> Reader:
    """Megatron-LM's IndexedDataset, mapped; latents and text are two sequences of a document."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset as MegatronDataset
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = str(folder / "megatron")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for parts in parts_of(folder):
        for part in parts:
            builder.add_item(torch.frombuffer(bytearray(part), dtype=torch.uint16))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    peer = MegatronDataset(prefix)

    def read(number: int, buffer: np.ndarray) -> None:
        fill(buffer, peer[2 * number], peer[2 * number + 1])

    return read


def mosaic(folder: Path) -> Reader:
    """MosaicML Streaming (MDS), local shards, two `bytes` columns."""
    from streaming import MDSWriter, StreamingDataset

    out = str(folder / "mds")
    with MDSWriter(out=out, columns={"latents": "bytes", "text": "bytes"}) as writer:
        for latents, text in parts_of(folder):
            writer.write({"latents": latents, "text": text})
    peer = StreamingDataset(local=out, batch_size=1, shuffle=False)

    def read(number: int, buffer: np.ndarray) -> None:
        sample = peer[number]
        fill(buffer, sample["latents"], sample["text"])

    return read


def litdata(folder: Path) -> Reader:
    """litData, local chunks of 64 MB, two `bytes` leaves, through the cache that its StreamingDataset reads."""
    # Of samples above 1 MiB in the mean 0.2.76 decodes one at a time by default, and finds them empty (struct.error).
    os.environ.setdefault("LITDATA_BATCH_DECODE", "2")
    from litdata.streaming.cache import Cache

    out = str(folder / "litdata")
    writer = Cache(out, chunk_bytes="64MB")
    for number, (latents, text) in enumerate(parts_of(folder)):
        writer[number] = {"latents": latents, "text": text}
    writer.done()
    writer.merge()
    peer = Cache(out, chunk_bytes="64MB")

    def read(number: int, buffer: np.ndarray) -> None:
        sample = peer[number]
        fill(buffer, sample["latents"], sample["text"])

    return read


def _tar(folder: Path) -> Path:
    path = folder / "0.tar"
    with tarfile.open(path, "w") as archive:
        for number, parts in enumerate(parts_of(folder)):
            for suffix, data in zip(("latents", "text"), parts, strict=True):
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


def webdataset(folder: Path) -> Reader:
    """WebDataset; it has no random access, so samples come in the order of the tar, whichever number is asked for."""
    import webdataset as wds

    path = str(_tar(folder))
    stream = iter(())

    def read(number: int, buffer: np.ndarray) -> None:
        nonlocal stream
        sample = next(stream, None)
        if sample is None:
            stream = iter(wds.WebDataset(path, shardshuffle=False))
            sample = next(stream)
        fill(buffer, sample["latents"], sample["text"])

    return read


def energon(folder: Path) -> Reader:
    """Megatron-Energon, a prepared WebDataset read by key."""
    from megatron.energon.cache.file_store import WebdatasetFileStore
    from megatron.energon.epathlib import EPath
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

    parent = folder / "energon"
    parent.mkdir()
    _tar(folder).replace(parent / "0.tar")
    WebdatasetPreparator.prepare_dataset(parent, ["0.tar"], split_parts_ratio=[("train", 1.0)], workers=1)
    peer = WebdatasetFileStore(EPath(parent))

    def read(number: int, buffer: np.ndarray) -> None:
        fill(buffer, *(peer[f"{number:06d}.{suffix}"][0] for suffix in ("latents", "text")))

    return read


def arrow(folder: Path) -> Reader:
    """Arrow's IPC file, mapped, a record batch per sample."""
    import pyarrow as pa

    schema = pa.schema([("latents", pa.large_binary()), ("text", pa.large_binary())])
    with pa.OSFile(str(folder / "0.arrow"), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for latents, text in parts_of(folder):
            writer.write_batch(pa.record_batch([pa.array([latents], pa.large_binary()),
                                                pa.array([text], pa.large_binary())], schema=schema))  # fmt: skip
    peer = pa.ipc.open_file(pa.memory_map(str(folder / "0.arrow")))

    def read(number: int, buffer: np.ndarray) -> None:
        batch = peer.get_batch(number)
        fill(buffer, batch.column(0)[0].as_buffer(), batch.column(1)[0].as_buffer())

    return read


IN_ORDER = ("webdataset",)  # no random access, so nothing can be said of samples of one size
PEERS: dict[str, tuple[str, Callable[[Path], Reader]]] = {  # name -> (module that has to be there, how it is read)
    "safetensors": ("safetensors", safetensors_files),
    "safetensors, one file": ("safetensors", safetensors_one),
    "megatron": ("megatron.core", megatron),
    "mosaic": ("streaming", mosaic),
    "litdata": ("litdata", litdata),
    "webdataset": ("webdataset", webdataset),
    "energon": ("megatron.energon", energon),
    "arrow": ("pyarrow", arrow),
}
