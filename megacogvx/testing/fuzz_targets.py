"""What is fuzzed: every parser of outside bytes in the data room, with a sound file for each."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from megacogvx.curation.captions import read_captions
from megacogvx.data.clips import Clip, read_clips, write_clips
from megacogvx.data.exchange.importers import read_folder, read_tar
from megacogvx.data.exchange.megatron import read_megatron
from megacogvx.data.indexed import IndexedDataset
from megacogvx.data.indexed.encoder_info import EncoderInfo
from megacogvx.data.indexed.record import Record
from megacogvx.data.indexed.recover import recover_shard
from megacogvx.data.indexed.shard import Shard
from megacogvx.data.indexed.side_columns import write_side_column
from megacogvx.data.video import read_frames, write_video
from megacogvx.testing.fuzz import SLACK, mutate
from megacogvx.testing.tiny_dataset import tiny_encoder, write_tiny_dataset

WITH_IMAGES = tiny_encoder("token_ids", latent_dtype="fp8_e4m3", first_frame=True)


PEERS = {  # not ours: asked for by name only, to compare
    "megatron-peer-index": "latents.idx",
    "megatron-peer-bin": "latents.bin",
}
THREADS = 64 << 20  # bytes of address space that a decoder's threads reserve for stacks and arenas


@dataclass(frozen=True)
class Target:
    """A file, and how it is read.

    Attributes:
        path: the sound file.
        parse: returns something comparable, or raises a typed error.
        mutation: how it is damaged.
        slack: bytes of address space that reading takes beside twice the file.
    """

    path: Path
    parse: Callable[[], Any]
    mutation: Callable[[bytes, int], bytes] = mutate
    slack: int = SLACK


def targets(folder: Path) -> dict[str, Callable[[], Target]]:
    """Return the targets by name; each makes its file below `folder` when called."""
    return {
        "index": lambda: _dataset(folder / "index", "shard-00000.idx"),
        "bin": lambda: _dataset(folder / "bin", "shard-00000.bin"),
        "manifest": lambda: _dataset(folder / "manifest", "manifest.json"),
        "column": lambda: _dataset(folder / "column", "columns/flow.g0001.col"),
        "recover": lambda: _recover(folder / "recover"),
        "fields-index": lambda: _dataset(folder / "fields-index", "shard-00000.idx", WITH_IMAGES),
        "fields-bin": lambda: _dataset(folder / "fields-bin", "shard-00000.bin", WITH_IMAGES),
        "fields-recover": lambda: _recover(folder / "fields-recover", WITH_IMAGES),
        "tar": lambda: _tar(folder / "tar"),
        "pt": lambda: _tensors(folder / "pt", ".pt"),
        "safetensors": lambda: _tensors(folder / "safetensors", ".safetensors"),
        "megatron": lambda: _megatron(folder / "megatron"),
        "captions": lambda: _captions(folder / "captions"),
        "clip-list": lambda: _clip_list(folder / "clip-list"),
        "video": lambda: _video(folder / "video"),
        **{name: partial(_megatron_peer, folder / name, damaged) for name, damaged in PEERS.items()},
    }


def records(folder: Path) -> list[Any]:
    """Return everything that a dataset's samples are."""
    dataset = IndexedDataset(folder)
    rows = [_row(dataset.sample(number, first_frame=True)) for number in range(len(dataset))]
    return [*rows, dataset.side_column("flow").tobytes()]


def _row(record: Record) -> tuple[Any, ...]:
    image = None if record.first_frame is None else _raw(record.first_frame)
    return record.sample_id, _raw(record.latents), _raw(record.text), record.metadata_json, image


def _raw(tensor: torch.Tensor) -> tuple[tuple[int, ...], bytes]:
    return tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _dataset(folder: Path, name: str, encoder: EncoderInfo | None = None) -> Target:
    write_tiny_dataset(folder, 6, encoder=encoder)
    ids = IndexedDataset(folder).sample_id
    write_side_column(folder, "flow", np.arange(len(ids), dtype=float), ids)
    return Target(folder / name, lambda: records(folder))


def _recover(folder: Path, encoder: EncoderInfo | None = None) -> Target:
    """The sound .bin's records or fewer; whichever are found must be what they were."""
    encoder = write_tiny_dataset(folder, 6, shards=1, captions=2, encoder=encoder)
    sound = {row[0]: row[1:] for row in _recovered(folder, encoder)}

    def parse() -> bool:
        return all(sound[row[0]] == row[1:] for row in _recovered(folder, encoder))

    return Target(folder / "shard-00000.bin", parse)


def _recovered(folder: Path, encoder: EncoderInfo) -> list[Any]:
    recover_shard(folder, "shard-00000", encoder)
    shard = Shard(folder, "shard-00000")
    return [_row(shard.record(row, first_frame=True)) for row in range(len(shard.index))]


def _sample_tensors(number: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(number)
    return {"latents": torch.randn(2, 2, 2, 8, generator=draw), "text": torch.randn(3, 8, generator=draw)}


def _shapes(samples: Any) -> list[Any]:
    """Formats without checksums can't tell a flipped value; shapes, names and facts have to be right or refused."""
    return [(tuple(s.latents.shape), tuple(s.text.shape)) for s in samples]


def _tensors(folder: Path, suffix: str) -> Target:
    folder.mkdir(parents=True)
    if suffix == ".pt":
        torch.save(_sample_tensors(0), folder / "0.pt")
    else:
        safetensors.torch.save_file(_sample_tensors(0), folder / "0.safetensors")
    size, marker = (folder / f"0{suffix}").stat().st_size, folder.parent / "code-ran"

    def parse() -> bool:
        try:
            return _within(read_folder(folder), size)
        finally:
            assert not marker.exists(), "the file's code ran"

    def mutation(data: bytes, seed: int) -> bytes:
        if suffix != ".pt" or seed % 4:
            return mutate(data, seed)
        hostile = _code(marker)  # alone, as in torch's oldest format, or inside its newest
        return mutate(hostile, seed) if seed % 8 else _in_archive(data, hostile)

    return Target(folder / f"0{suffix}", parse, mutation)


def _code(path: Path) -> bytes:
    """Return a pickle, of protocol 0, that makes an empty file at `path` when it is loaded without care."""
    return f"c__builtin__\nopen\n(V{path}\nVw\ntR.".encode()


def _in_archive(data: bytes, hostile: bytes) -> bytes:
    """Return torch's archive `data` with `hostile` in place of its data.pkl."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            target.writestr(name, hostile if name.endswith("data.pkl") else source.read(name))
    return out.getvalue()


def _within(samples: Any, size: int) -> bool:
    """No checksum tells a changed value or shape of these formats: what is read may be no larger than the file."""
    return all(4 * (s.latents.numel() + s.text.numel()) <= 2 * size for s in samples)


def _tar(folder: Path) -> Target:
    folder.mkdir(parents=True)
    path = folder / "0.tar"
    with tarfile.open(path, "w") as archive:
        for number in range(3):
            facts = json.dumps({"n": number}).encode()
            for suffix, data in (("safetensors", safetensors.torch.save(_sample_tensors(number))), ("json", facts)):
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    size = path.stat().st_size
    return Target(path, lambda: _within(read_tar(path), size), _hostile_tar)


def _hostile_tar(data: bytes, seed: int) -> bytes:
    """Bytes at random, or one more member that no reader should take: out of the folder, a link, a device."""
    if seed % 4:
        return mutate(data, seed)
    out = io.BytesIO(data)
    member = tarfile.TarInfo(("../escape.json", "/etc/escape.json", "a.json", "b.pt", "c.json")[seed // 4 % 5])
    member.type = (tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)[seed // 20 % 5]
    member.linkname = "/etc/hostname"
    with tarfile.open(fileobj=out, mode="a") as archive:
        archive.addfile(member)
    return out.getvalue()


def _megatron(folder: Path) -> Target:
    folder.mkdir(parents=True)
    for name, size in (("latents", 64), ("text", 24)):
        values = np.arange(3 * size, dtype="<f4")
        head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 7, 3, 4)
        sizes, offsets = np.full(3, size, "<i4"), np.arange(3, dtype="<i8") * 4 * size
        documents = np.arange(4, dtype="<i8")
        (folder / f"{name}.idx").write_bytes(head + sizes.tobytes() + offsets.tobytes() + documents.tobytes())
        (folder / f"{name}.bin").write_bytes(values.tobytes())
    rows = [{"latents": [2, 2, 2, 8], "text": [3, 8]}] * 3
    (folder / "shapes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = (folder / "latents", folder / "text", folder / "shapes.jsonl")
    return Target(folder / "latents.idx", lambda: _shapes(read_megatron(*paths)))


def _megatron_peer(folder: Path, damaged: str) -> Target:
    """The same files, read by Megatron-LM's own reader; its errors are of many types."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset as MegatronDataset

    _megatron(folder)

    def parse() -> list[bytes]:
        peer = MegatronDataset(str(folder / "latents"))
        return [peer[number].tobytes() for number in range(len(peer))]

    return Target(folder / damaged, parse)


def _captions(folder: Path) -> Target:
    """A CSV list; what comes out is what stands in it, since text has no checksum: names must stay in the folder."""
    folder.mkdir(parents=True)
    rows = 'video,start,end,caption\na.mp4,0,2,ein Kätzchen\nb.mp4,1,2.5,"Déjà, vu"\n'
    (folder / "list.csv").write_text(rows, encoding="utf-8")
    size = len(rows.encode())

    def parse() -> bool:
        captions = read_captions(folder / "list.csv")
        inside = all(not Path(c.video).is_absolute() and ".." not in Path(c.video).parts for c in captions)
        return inside and sum(len(c.caption.encode()) for c in captions) <= size

    return Target(folder / "list.csv", parse, _broken_text)


def _broken_text(data: bytes, seed: int) -> bytes:
    """Bytes at random, or a byte that no UTF-8 text holds there."""
    if seed % 3:
        return mutate(data, seed)
    place = seed // 3 * 7 % len(data)
    return data[:place] + (b"\xff", b"\xc3", b"\xed\xa0\x80", b"\0")[seed // 3 % 4] + data[place:]


def _clip_list(folder: Path) -> Target:
    folder.mkdir(parents=True)
    write_video(folder / "0.mp4", torch.zeros(9, 16, 16, 3, dtype=torch.uint8), 8)
    clip = Clip(
        path=folder / "0.mp4", caption="ein Kätzchen", frames=9, height=16, width=16, fps=8.0, source="a.mp4", start=0.0
    )
    write_clips(folder / "clips.jsonl", [clip] * 3)
    return Target(folder / "clips.jsonl", lambda: all(c.path.parent == folder for c in read_clips(folder)))


def _video(folder: Path) -> Target:
    folder.mkdir(parents=True)
    frames = torch.randint(0, 255, (9, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_video(folder / "0.mp4", frames, 8)
    return Target(folder / "0.mp4", lambda: read_frames(folder / "0.mp4").dtype == torch.uint8, slack=THREADS)
