"""Whether the headers in a `.bin` agree with the index beside it."""

from __future__ import annotations

from megacogvx.data.indexed.layout import (
    BIN_HEADER,
    BIN_MAGIC,
    IMAGE_CHANNELS,
    IMAGE_HEADER,
    IMAGE_MAGIC,
    IMAGE_RECORD_MAGIC,
    RECORD_HEADER,
    RECORD_MAGIC,
    ShardIndex,
    aligned,
    check_version,
    unseal,
)
from megacogvx.data.indexed.remote import Folder, RemotePath
from megacogvx.data.indexed.source import Source
from megacogvx.errors import DataError


def check_bin_header(path: Folder, index: ShardIndex) -> None:
    """Check that the `.bin` at `path` is the one that `index` is of.

    Raises:
        DataError: its header is damaged or says something else.
    """
    if isinstance(path, RemotePath):
        header = path.read_range(0, BIN_HEADER.size)
    else:
        try:
            with path.open("rb") as file:
                header = file.read(BIN_HEADER.size)
        except OSError as error:
            raise DataError(f"{path} can't be read: {error.strerror}") from None
    _, major, minor, _, uuid, *fields = unseal(BIN_HEADER, header, BIN_MAGIC, str(path))
    check_version(major, minor, str(path))
    if uuid != index.uuid:
        raise DataError(f"{path} has uuid {uuid.hex()}, the .idx beside it {index.uuid.hex()}: they are of two shards")
    if tuple(fields) != index.encoder.bin_header_values:
        raise DataError(
            f"{path} holds (channels, text width, dtype codes) {fields}, its index says otherwise: "
            f"{list(index.encoder.bin_header_values)}"
        )


def check_record_header(source: Source, index: ShardIndex, row: int, where: str) -> None:
    """Check that the header of record `row` agrees with the index, and the hash behind it; `where` names the record.

    Raises:
        DataError: it is damaged or says something else.
    """
    columns = index.columns
    has_image = index.encoder.first_frame and columns["image_offset"][row] > 0
    magic = IMAGE_RECORD_MAGIC if has_image else RECORD_MAGIC
    header = source.view(int(columns["record"][row]), RECORD_HEADER.size).tobytes()
    _, frames, height, width, channels, *rest, note_hash, number = unseal(RECORD_HEADER, header, magic, where)
    names = ("frames", "height", "width", "text_length", "sample_id", "text_offset", "text_hash", "metadata_length")
    expected = [int(columns[name][row]) for name in names]
    good = (
        note_hash in (0, int(columns["metadata_hash"][row]) % 2**32) and channels == 2 * index.encoder.latent_channels
    )
    # Its number is above the row where records before it were lost, and the index was rebuilt.
    if not good or [frames, height, width, *rest] != expected or number < row:
        raise DataError(f"{where}: the record's header disagrees with the index")
    end = aligned(int(columns["metadata_offset"][row]) + int(columns["metadata_length"][row])) + 8 * frames
    if int.from_bytes(source.view(end, 8).tobytes(), "little") != int(columns["latent_hash"][row]):
        raise DataError(damaged(where, "the checksum behind the latents' checksums"))
    if has_image:
        _check_image_header(source, index, row, where)


def damaged(where: str, what: str) -> str:
    """Return what is said when `what` of the record that `where` names differs from its checksum."""
    return f"{where}: {what} is damaged (its checksum differs); restore the file from a copy"


def _check_image_header(source: Source, index: ShardIndex, row: int, where: str) -> None:
    start = int(index.columns["image_offset"][row])
    header = source.view(start - IMAGE_HEADER.size, IMAGE_HEADER.size).tobytes()
    _, *found = unseal(IMAGE_HEADER, header, IMAGE_MAGIC, f"{where}: first frame")
    height, width, pixels, number = (
        int(index.columns[name][row]) for name in ("image_height", "image_width", "image_hash", "sample_id")
    )
    if found != [height, width, IMAGE_CHANNELS, number, pixels]:
        raise DataError(f"{where}: the header of its first frame disagrees with the index")
