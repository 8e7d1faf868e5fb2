"""Samples from folders of `.pt` or `.safetensors` files and from WebDataset tars, one at a time.

A sample is two tensors, `latents` and `text`, perhaps a third, `first_frame`, and a JSON object of facts. In a folder
it is one file that holds the tensors, with NAME.json beside it if there are facts; in a tar it is the members that
share a name up to the first dot (https://github.com/webdataset/webdataset), with the tensors in one member or in
KEY.latents.pt, KEY.text.pt and KEY.first_frame.pt.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import safetensors.torch
import torch
import xxhash

from megacogvx.data.indexed.encoder_info import EncoderInfo
from megacogvx.data.indexed.fields import field_dtype, to_field
from megacogvx.data.indexed.layout import MAX_ID, MAX_METADATA_BYTES, load_json
from megacogvx.data.indexed.writer import DatasetWriter
from megacogvx.errors import DataError

Axes = Literal["thwc", "cthw", "tchw"]
TENSOR_SUFFIXES = (".pt", ".pth", ".safetensors")
TO_THWC: dict[str, tuple[int, int, int, int]] = {"thwc": (0, 1, 2, 3), "cthw": (1, 2, 3, 0), "tchw": (0, 2, 3, 1)}
NO_VARIANCE = -30.0  # log-variance of latents that were drawn already: what the posterior's limits call none


@dataclass(frozen=True)
class ImportedSample:
    """One sample as found.

    Attributes:
        key: names it, unique in its source; the sample id is its hash.
        latents, text: tensors of any float dtype; token ids of any integer dtype.
        metadata: facts.
        first_frame: pixels uint8 `[H, W, 3]`, if there are any.
    """

    key: str
    latents: torch.Tensor
    text: torch.Tensor
    metadata: dict[str, Any]
    first_frame: torch.Tensor | None = None


def read_folder(folder: Path) -> Iterator[ImportedSample]:
    """Yield the samples of the `.pt`, `.pth` and `.safetensors` files of `folder`, by name.

    Raises:
        DataError: there is no such file, or one can't be read; names it.
    """
    paths = sorted(path for path in folder.iterdir() if path.suffix in TENSOR_SUFFIXES) if folder.is_dir() else []
    if not paths:
        raise DataError(f"{folder} holds no {', '.join(TENSOR_SUFFIXES)} file")
    for path in paths:
        tensors = _read_tensors(path.read_bytes(), path.suffix, str(path))
        facts = path.with_suffix(".json")
        metadata = _read_json(facts.read_bytes(), str(facts)) if facts.is_file() else {}
        yield _sample(path.stem, tensors, metadata, str(path))


def read_tar(path: Path) -> Iterator[ImportedSample]:
    """Yield the samples of a WebDataset tar, in order. Members are read into memory, never written to disk.

    Raises:
        DataError: the tar is damaged, or holds links, devices, paths that leave it, or an incomplete sample.
    """
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as archive:  # no compression: what is in it can't be larger than the file
            key, members = "", dict[str, bytes]()
            for member in archive:
                name, suffix = _member_name(member, size, path)
                if suffix and name != key and members:
                    yield _of_members(key, members, path)
                    members = {}
                if suffix:
                    if suffix in members:
                        raise DataError(f"{path}: member {member.name} occurs twice")
                    key, members[suffix] = name, _member_bytes(archive, member, path)
            if members:
                yield _of_members(key, members, path)
    except (tarfile.TarError, EOFError, OSError, UnicodeError, ValueError, OverflowError) as error:
        raise DataError(f"{path} can't be read as a tar: {error}") from None


def import_samples(
    samples: Iterable[ImportedSample], folder: Path, encoder: EncoderInfo, *, axes: Axes = "thwc", shard_bytes: int,
    name: Callable[[int], str],
) -> list[str]:  # fmt: skip
    """Write `samples` as shards of about `shard_bytes` latents each; returns the shards' names.

    Args:
        samples: latents with C channels (drawn already) or with 2C (mean, log-variance).
        folder: of the dataset.
        encoder: what made them; texts must fit it, "padded" ones are filled with zeros.
        axes: order of the latents' axes.
        shard_bytes: a shard is closed once it holds so many bytes of latents.
        name: number -> shard name.

    Raises:
        DataError: a sample doesn't fit `encoder`, or occurs twice, or another import began `folder`.
    """
    names: list[str] = []
    seen: set[int] = set()
    writer, held, ids = None, 0, list[int]()
    for sample in samples:
        sample_id = xxhash.xxh3_64_intdigest(sample.key.encode("utf-8", "surrogateescape")) % MAX_ID
        if sample_id in seen:
            raise DataError(f"sample {sample.key!r} occurs twice (or its 64-bit hash does); rename one")
        seen.add(sample_id)
        latents, text = _moments(sample, axes, encoder), _text(sample, encoder)
        if writer is None:
            writer, held, ids = DatasetWriter(folder, encoder, name(len(names))), 0, []
            names.append(writer.name)
        ids.append(sample_id)
        if not writer.finished:  # an earlier, interrupted import wrote it
            metadata = {**sample.metadata, "key": sample.key}
            image = sample.first_frame if encoder.first_frame else None
            writer.add_item(latents=latents, text=text, sample_id=sample_id, metadata=metadata, first_frame=image)
        held += latents.numel() * latents.element_size()
        if held >= shard_bytes:
            _finish(writer, ids)
            writer = None
    if writer is not None:
        _finish(writer, ids)
    return names


def _finish(writer: DatasetWriter, ids: list[int]) -> None:
    if writer.finished:
        writer.check_finished(ids)
    writer.finalize()


def _member_name(member: tarfile.TarInfo, size: int, path: Path) -> tuple[str, str]:
    """Return (key, suffix) of a file; a folder has no suffix."""
    parts = PurePosixPath(member.name).parts
    if member.name.startswith("/") or ".." in parts:
        raise DataError(f"{path}: member {member.name!r} leaves the archive")
    if member.isdir():
        return "", ""
    if not member.isreg():
        raise DataError(f"{path}: member {member.name!r} is a link or a device; only plain files are read")
    if not 0 <= member.size <= size:
        raise DataError(f"{path}: member {member.name!r} says it has {member.size} bytes, the whole file has {size}")
    stem, dot, suffix = parts[-1].partition(".") if parts else ("", "", "")
    if not stem or not dot:
        raise DataError(f"{path}: member {member.name!r} is not named KEY.SUFFIX")
    return "/".join((*parts[:-1], stem)), suffix.lower()


def _member_bytes(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> bytes:
    file = archive.extractfile(member)
    data = file.read() if file is not None else b""
    if len(data) != member.size:
        raise DataError(f"{path}: member {member.name!r} is truncated")
    return data


def _of_members(key: str, members: dict[str, bytes], path: Path) -> ImportedSample:
    tensors: dict[str, Any] = {}
    for suffix, data in members.items():
        prefix, _, last = suffix.rpartition(".")
        if f".{last}" in TENSOR_SUFFIXES:
            tensors |= _read_tensors(data, f".{last}", f"{path}: {key}.{suffix}", prefix)
    metadata = _read_json(members["json"], f"{path}: {key}.json") if "json" in members else {}
    return _sample(key, tensors, metadata, f"{path}: sample {key}")


def _read_tensors(data: bytes, suffix: str, where: str, name: str = "") -> dict[str, Any]:
    """Return the tensors of a file by name; a file of one tensor needs a `name`."""
    if suffix == ".safetensors":
        try:
            return safetensors.torch.load(data)
        except Exception as error:  # SafetensorError, and what its parser lets through
            raise DataError(f"{where} is not a safetensors file: {error}") from None
    try:
        if zipfile.is_zipfile(io.BytesIO(data)):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > len(data):
                    raise DataError(f"{where} is compressed, or its directory is damaged; torch.save doesn't compress")
        value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except DataError:
        raise
    except Exception as error:  # the unpickler raises whatever a damaged file makes it do; code in it is refused
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"{where} can't be loaded as plain tensors: {type(error).__name__}: {reason}") from None
    if isinstance(value, torch.Tensor):
        value = {name: value}
    if not isinstance(value, dict):
        raise DataError(f"{where} holds a {type(value).__name__}; it must hold tensors by name")
    for tensor in value.values():
        if isinstance(tensor, torch.Tensor) and tensor.numel() * tensor.element_size() > len(data):
            raise DataError(f"{where} holds a tensor of {list(tensor.shape)}, more than the file's {len(data)} bytes")
    return value


def _read_json(data: bytes, where: str) -> dict[str, Any]:
    if len(data) > MAX_METADATA_BYTES:
        raise DataError(f"{where} has {len(data)} bytes, the limit is {MAX_METADATA_BYTES}")
    return load_json(data, where)


def _sample(key: str, tensors: dict[str, Any], metadata: dict[str, Any], where: str) -> ImportedSample:
    for name in ("latents", "text"):
        tensor = tensors.get(name)
        is_plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and not tensor.is_complex()
        if tensor is None or not is_plain or not (name == "text" or tensor.is_floating_point()):
            found = ", ".join(map(str, tensors)) or "nothing"
            raise DataError(f"{where} lacks a tensor of floats called {name!r}; it holds {found}")
    image = tensors.get("first_frame")
    if image is not None and not (isinstance(image, torch.Tensor) and image.layout == torch.strided):
        raise DataError(f"{where}: first_frame must be a plain tensor")
    return ImportedSample(key, tensors["latents"], tensors["text"], metadata, image)


def _moments(sample: ImportedSample, axes: Axes, encoder: EncoderInfo) -> torch.Tensor:
    channels = encoder.latent_channels
    if sample.latents.ndim != 4:
        raise DataError(f"sample {sample.key!r}: latents must have the axes {axes}, not {list(sample.latents.shape)}")
    latents = sample.latents.permute(TO_THWC[axes])
    if latents.shape[3] not in (channels, 2 * channels):
        raise DataError(
            f"sample {sample.key!r}: latents {list(sample.latents.shape)} read as {axes} have {latents.shape[3]} "
            f"channels, the encoder says {channels} (or {2 * channels} with the log-variance); try other --axes"
        )
    if not torch.isfinite(latents.float()).all():
        raise DataError(f"sample {sample.key!r}: latents hold NaN or infinity")
    if latents.shape[3] == channels:
        latents = latents.float()
        latents = torch.cat([latents, torch.full_like(latents, NO_VARIANCE)], dim=3)
    return to_field(latents, encoder.latent_dtype)


def _text(sample: ImportedSample, encoder: EncoderInfo) -> torch.Tensor:
    text = sample.text
    if encoder.text_kind == "token_ids":
        return _ids(sample, encoder)
    if text.ndim == 3 and len(text) == 1:
        text = text[0]
    good = text.is_floating_point() and text.ndim == 2 and text.shape[1] == encoder.text_width
    if not good or len(text) > encoder.text_length:
        raise DataError(
            f"sample {sample.key!r}: text {text.dtype} {list(sample.text.shape)} is not floats of "
            f"[L, {encoder.text_width}] with L up to {encoder.text_length}"
        )
    if encoder.text_kind == "padded":
        text = torch.nn.functional.pad(text.float(), (0, 0, 0, encoder.text_length - len(text)))
    return to_field(text, encoder.text_dtype)


def _ids(sample: ImportedSample, encoder: EncoderInfo) -> torch.Tensor:
    """Return the ids of the padded text; shorter ones are filled with <pad>, which is 0 in T5."""
    ids = sample.text.flatten()
    if ids.is_floating_point() or ids.dtype == torch.bool or len(ids) > encoder.text_length:
        raise DataError(
            f"sample {sample.key!r}: text {ids.dtype} {list(sample.text.shape)} is not up to {encoder.text_length} "
            "token ids"
        )
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) > torch.iinfo(field_dtype(encoder.text_dtype)).max):
        raise DataError(f"sample {sample.key!r}: token ids must lie in 0 .. the largest {encoder.text_dtype}")
    return to_field(torch.nn.functional.pad(ids.long(), (0, encoder.text_length - len(ids))), encoder.text_dtype)
