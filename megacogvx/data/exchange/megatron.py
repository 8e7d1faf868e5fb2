"""Samples from Megatron-LM's indexed format: two prefixes of 1-D sequences, and a JSONL that tells the shapes.

PREFIX.idx (megatron/core/datasets/indexed_dataset.py of Megatron-LM, version 1, little-endian): 9 bytes magic, u64
version, u8 dtype code, u64 sequences, u64 documents, int32 lengths `[n]`, int64 byte offsets `[n]`, int64 documents
`[d]`; PREFIX.bin holds the sequences. It knows neither shapes nor bf16, so bf16 comes as uint16 (code 8) bits.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megacogvx.data.exchange.importers import ImportedSample
from megacogvx.data.indexed.layout import load_json
from megacogvx.errors import DataError

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
FLOAT_CODES: dict[int, np.dtype[Any]] = {6: np.dtype("<f8"), 7: np.dtype("<f4"), 8: np.dtype("<u2")}


class MegatronIndex:
    """The sequences of one prefix, every offset checked against the size of the .bin."""

    def __init__(self, prefix: Path) -> None:
        """Read PREFIX.idx.

        Raises:
            DataError: a file is missing or damaged, or holds integers (tokens).
        """
        self.idx, self.bin = prefix.with_name(f"{prefix.name}.idx"), prefix.with_name(f"{prefix.name}.bin")
        try:
            data, self.bin_bytes = self.idx.read_bytes(), self.bin.stat().st_size
        except OSError as error:
            raise DataError(f"{error.filename}: {error.strerror}") from None
        if len(data) < HEADER.size or not data.startswith(MAGIC):
            raise DataError(f"{self.idx} is not an index of Megatron-LM: it starts with {data[:9]!r}")
        _, version, code, count, documents = HEADER.unpack_from(data)
        if version != 1 or code not in FLOAT_CODES:
            raise DataError(
                f"{self.idx}: version {version}, dtype code {code}; read are version 1 with float64 (6), float32 (7) "
                "and bf16 as uint16 (8)"
            )
        # The multimodal variant appends one mode byte per sequence.
        sizes = {HEADER.size + 12 * count + 8 * documents + extra for extra in (0, count)}
        if len(data) not in sizes:
            raise DataError(f"{self.idx} has {len(data)} bytes, {count} sequences need {min(sizes)}: truncated?")
        self.dtype = FLOAT_CODES[code]
        self.lengths = np.frombuffer(data, "<i4", count, HEADER.size)
        self.offsets = np.frombuffer(data, "<i8", count, HEADER.size + 4 * count)
        ends = self.offsets.astype(object) + self.lengths.astype(object) * self.dtype.itemsize
        bad = [n for n in range(count) if self.lengths[n] < 0 or self.offsets[n] < 0 or ends[n] > self.bin_bytes]
        if bad:
            raise DataError(f"{self.idx}: sequence {bad[0]} lies outside of the {self.bin_bytes} bytes of {self.bin}")

    def __len__(self) -> int:
        return len(self.lengths)

    def tensor(self, number: int) -> torch.Tensor:
        """Return sequence `number`, one axis; bf16 where the file holds uint16."""
        with self.bin.open("rb") as file:
            file.seek(int(self.offsets[number]))
            data = bytearray(file.read(int(self.lengths[number]) * self.dtype.itemsize))
        values = torch.from_numpy(np.frombuffer(data, self.dtype))
        return values.view(torch.bfloat16) if self.dtype.kind == "u" else values


def read_megatron(latents: Path, text: Path, shapes: Path) -> Iterator[ImportedSample]:
    """Yield the samples of two prefixes, sequence n of one with sequence n of the other.

    Args:
        latents, text: prefixes.
        shapes: JSONL, a line per sample: {"latents": [four sizes], "text": [L, E], "key": ..., any other facts}.

    Raises:
        DataError: the three don't fit together.
    """
    indexes = {"latents": MegatronIndex(latents), "text": MegatronIndex(text)}
    try:
        lines = [line for line in shapes.read_bytes().split(b"\n") if line.strip()]
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from None
    if {len(lines)} != {len(index) for index in indexes.values()}:
        counts = ", ".join(f"{index.idx}: {len(index)}" for index in indexes.values())
        raise DataError(f"{shapes} has {len(lines)} lines, but {counts}")
    for number, line in enumerate(lines):
        facts = load_json(line, f"{shapes}, line {number + 1}")
        tensors = {
            name: _shaped(index.tensor(number), facts.pop(name, None), f"{shapes}, line {number + 1}: {name}")
            for name, index in indexes.items()
        }
        yield ImportedSample(str(facts.pop("key", number)), tensors["latents"], tensors["text"], facts)


def _shaped(values: torch.Tensor, shape: Any, where: str) -> torch.Tensor:
    good = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    count = 1
    for size in shape if good else ():
        count *= size
    if not good or count != len(values):
        raise DataError(f"{where} must be a list of sizes whose product is {len(values)}, not {shape!r}")
    return values.view(shape)
