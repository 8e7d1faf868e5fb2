"""The bytes of a shard: what stands where in `NAME.bin` and `NAME.idx` (format version 2.0, little-endian).

    DATASET/manifest.json     lists the shards (`manifest.py`)
    DATASET/NAME.bin          records, written once
    DATASET/NAME.idx          columns over the records; a shard exists once its .idx does

NAME.bin
     0   8  magic "MCVXBIN\\0"
     8   2  u16 major version       10  2  u16 minor version       12  4  u32 header bytes = 64
    16  16  shard uuid, equal to the .idx's: an .idx can't be paired with another shard's .bin
    32   4  u32 latent channels 2C  36  4  u32 text width E        40  2  u16 dtype code of the latents
    42   2  u16 dtype code of the text (either 0: bf16)             44 12  zero
    56   8  u64 xxh3 of bytes 0-55
    64      records, each from a multiple of 64:
            record header 64 B | latents [T, h, w, 2C] | 0s to 64 | text [L, E], or ids [L] | 0s to 64 | JSON | 0s to 64
            | u64 xxh3 of each latent frame [T] | u64 xxh3 of these | 0s to 64
            and, where the sample has a first frame: image header 64 B | pixels u8 [H, W, 3] | 0s to 64
    The text is left out of a record when an earlier record of the shard has the same bytes (equal captions): the header
    and the column `text_offset` point at the earlier one.

record header (with the .bin header enough to rebuild a lost .idx)
     0   4  "SMPL", or "SMPI" with a first frame
     4  4 x u16  T, h, w, 2C             12  4  u32 text tokens L       16  8  u64 sample id
    24   8  u64 offset of the text in the file         32  8  u64 xxh3 of the text
    40   4  u32 JSON bytes   44  4  u32 low half of the JSON's xxh3 (0: not kept)   48  8  u64 number of the record
    56   8  u64 xxh3 of bytes 0-55

image header
     0   4  "FRST"     4  2 x u16  H, W                  8  4  u32 channels = 3
    12   8  u64 sample id      20  8  u64 xxh3 of the pixels      28 28  zero      56  8  u64 xxh3 of bytes 0-55

NAME.idx
     0   8  magic "MCVXIDX\\0"
     8   2  u16 major version       10  2  u16 minor version       12  4  u32 header bytes = 128
    16  16  shard uuid              32  8  u64 records             40  8  u64 bytes of the .bin
    48   8  u64 bytes of the .idx   56  4  u32 columns             60  4  u32 alignment = 64
    64   8  u64 schema offset       72  4  u32 schema bytes        76  4  zero
    80   8  u64 directory offset    88  8  u64 xxh3 of schema and directory
    96  24  zero                   120  8  u64 xxh3 of bytes 0-119
   schema     JSON: the `EncoderInfo`
   directory  64 B a column: 32s name, u16 dtype code, 6 zero, u64 offset, u64 bytes, u64 xxh3 of the column
   columns    each from a multiple of 64; see `COLUMNS`, `IMAGE_COLUMNS`; unknown ones are skipped

Every hash is xxh3-64. They form a chain (manifest -> header, schema, directory -> columns -> text, JSON, hashes of the
latent frames -> these), so that opening a dataset reads only its indexes and still ends in checked bytes. Latents are
hashed per frame: a rank that needs frames 3-5 reads and checks only these. Their hashes stand in the record, behind the
JSON, which every checked read looks at anyway; in the index they would be most of its bytes.

The dtypes of latents and text are one kind a corpus, so they stand once in the schema and in each .bin's header, not in
a column per record. Versions 1.0 and 1.1 had the hashes of the frames in the index; they are refused.

Compared with the Megatron-LM format of the same suffixes: shapes, bf16, checksums, pairing by uuid, sizes checked
against the files, and every check an exception.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import xxhash

from megacogvx.data.indexed.encoder_info import EncoderInfo
from megacogvx.errors import DataError

BIN_MAGIC, IDX_MAGIC = b"MCVXBIN\0", b"MCVXIDX\0"
RECORD_MAGIC, IMAGE_RECORD_MAGIC, IMAGE_MAGIC = b"SMPL", b"SMPI", b"FRST"
MAJOR, MINOR = 2, 0
ALIGNMENT = 64  # a cache line, and what vector loads want
BIN_HEADER = struct.Struct("<8sHHI16sIIHH12xQ")
RECORD_HEADER = struct.Struct("<4sHHHHIQQQIIQQ")
IMAGE_HEADER = struct.Struct("<4sHHIQQ28xQ")
IDX_HEADER = struct.Struct("<8sHHI16sQQQIIQI4xQQ24xQ")
DIRECTORY_ENTRY = struct.Struct("<32sH6xQQQ")
DTYPE_CODES = {"<u2": 8, "<u4": 14, "<u8": 15}  # numbers 1-8 are Megatron-LM's
COLUMNS = {
    "sample_id": "<u8",  # 64-bit key of the sample; merging and filtering keep it, every random draw uses it
    "record": "<u8",  # offset of the record header in the .bin
    "frames": "<u2",  # latents: T, h, w, in latent cells
    "height": "<u2",
    "width": "<u2",
    "text_offset": "<u8",
    "text_length": "<u4",  # tokens
    "text_hash": "<u8",
    "metadata_offset": "<u8",
    "metadata_length": "<u4",  # bytes
    "metadata_hash": "<u8",
    "latent_hash": "<u8",  # of the hashes of its latent frames
}
IMAGE_COLUMNS = {  # in shards whose `EncoderInfo.first_frame` is set; all 0 for a sample without one
    "image_offset": "<u8",  # of the pixels
    "image_height": "<u2",  # pixels
    "image_width": "<u2",
    "image_hash": "<u8",
}
IMAGE_CHANNELS = 3
MAX_SIDE = 2**16 - 1  # latent frames, rows, columns; pixels of a first frame
MAX_METADATA_BYTES = 2**20
MAX_SHARD_BYTES = 2**48
MAX_ID = 2**64 - 2  # 2^64 - 1 is -1, the padding's id

assert (BIN_HEADER.size, RECORD_HEADER.size, IDX_HEADER.size, DIRECTORY_ENTRY.size) == (64, 64, 128, 64)
assert IMAGE_HEADER.size == ALIGNMENT, "pixels follow their header, aligned"


@dataclass(frozen=True)
class ShardIndex:
    """The content of one `.idx`, checked.

    Attributes:
        uuid: 16 bytes, equal to the .bin's.
        encoder: what made the records.
        bin_bytes, idx_bytes: sizes of the two files.
        columns: name -> array `[n]`, as `columns_of(encoder)` lists them.
        checksum: xxh3 of header, schema and directory; the manifest holds it.
    """

    uuid: bytes
    encoder: EncoderInfo
    bin_bytes: int
    idx_bytes: int
    columns: Mapping[str, np.ndarray]
    checksum: int

    def __len__(self) -> int:
        return len(self.columns["sample_id"])


def columns_of(encoder: EncoderInfo) -> dict[str, str]:
    """Return the index columns of a shard, name -> dtype."""
    return {**COLUMNS, **(IMAGE_COLUMNS if encoder.first_frame else {})}


def digest(data: Any) -> int:
    """Return xxh3-64 of a bytes-like object."""
    return int(xxhash.xxh3_64_intdigest(data))


def aligned(offset: int) -> int:
    """Return the next multiple of `ALIGNMENT`."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def sealed_hashes(frames: Sequence[int]) -> bytes:
    """Return the bytes of the hashes of latent frames, and of their own hash."""
    packed = struct.pack(f"<{len(frames)}Q", *frames)
    return packed + struct.pack("<Q", digest(packed))


def canonical_json(value: Any) -> bytes:
    """Return `value` as compact UTF-8 JSON with sorted keys: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def load_json(data: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object strictly: no repeated keys, no NaN.

    Raises:
        DataError: `data` is anything else.
    """
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{where} must hold a JSON object, not a {type(value).__name__}")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("a key is repeated")
    return dict(pairs)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not allowed")


def sealed(header: struct.Struct, *values: Any) -> bytes:
    """Pack `values` and the xxh3 of everything before the last 8 bytes."""
    packed = header.pack(*values, 0)
    return packed[:-8] + struct.pack("<Q", digest(packed[:-8]))


def unseal(header: struct.Struct, data: bytes, magic: bytes, where: str) -> tuple[Any, ...]:
    """Unpack what `sealed` made, without the hash.

    Raises:
        DataError: the data is too short, has another magic, or its hash differs.
    """
    if len(data) < header.size:
        raise DataError(f"{where} is truncated: {len(data)} bytes of a header of {header.size}")
    if not data.startswith(magic):
        start = bytes(data[: len(magic)])
        raise DataError(f"{where} starts with {start!r}, not {magic!r}: another kind of file, or damaged")
    *values, stored = header.unpack(data[: header.size])
    if digest(data[: header.size - 8]) != stored:
        raise DataError(f"{where}: the header is damaged (its checksum differs); restore the file from a copy")
    return tuple(values)


def check_version(major: int, minor: int, where: str) -> None:
    """Refuse another major version; a newer minor one only adds columns."""
    if major != MAJOR:
        raise DataError(
            f"{where} has format version {major}.{minor}, this program reads {MAJOR}.x: encode the samples again, or "
            "read them with the program that wrote them"
        )


def write_index(uuid: bytes, encoder: EncoderInfo, bin_bytes: int, columns: Mapping[str, np.ndarray]) -> bytes:
    """Return the bytes of the `.idx`."""
    schema = canonical_json(encoder.model_dump(mode="json"))
    directory_offset = aligned(IDX_HEADER.size + len(schema))
    names = columns_of(encoder)
    end = directory_offset + DIRECTORY_ENTRY.size * len(names)
    directory, body = b"", b""
    for name, dtype in names.items():
        column = np.ascontiguousarray(columns[name], dtype=dtype).tobytes()
        body += bytes(aligned(end + len(body)) - end - len(body))
        directory += DIRECTORY_ENTRY.pack(
            name.encode(), DTYPE_CODES[dtype], end + len(body), len(column), digest(column)
        )
        body += column
    header = sealed(
        IDX_HEADER, IDX_MAGIC, MAJOR, MINOR, IDX_HEADER.size, uuid, len(columns["sample_id"]), bin_bytes,
        end + len(body), len(names), ALIGNMENT, IDX_HEADER.size, len(schema), directory_offset,
        digest(schema + directory),
    )  # fmt: skip
    return header + schema + bytes(directory_offset - IDX_HEADER.size - len(schema)) + directory + body
