"""The bytes of a shard: documented offsets, and every damage of an index is an error."""

import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megacogvx.data.indexed import layout
from megacogvx.data.indexed.layout import COLUMNS, digest
from megacogvx.data.indexed.manifest import finish_dataset, read_manifest
from megacogvx.data.indexed.parse import parse_index
from megacogvx.errors import DataError
from megacogvx.testing.tiny_dataset import tiny_encoder, write_tiny_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    write_tiny_dataset(folder, 6, shards=1)
    return folder


@pytest.fixture(scope="module")
def idx(folder):
    return (folder / "shard-00000.idx").read_bytes()


def test_documented_offsets(folder, idx):
    """Reads both files with plain `struct`, as the docstring of layout.py says, not with the module's own structs."""
    data = (folder / "shard-00000.bin").read_bytes()
    assert data[:8] == b"MCVXBIN\0" and idx[:8] == b"MCVXIDX\0"
    assert struct.unpack_from("<HHI", data, 8) == (2, 0, 64) and struct.unpack_from("<HHI", idx, 8) == (2, 0, 128)
    assert data[16:32] == idx[16:32]
    assert struct.unpack_from("<II", data, 32) == (8, 8)
    assert struct.unpack_from("<QQQ", idx, 32) == (6, len(data), len(idx))
    assert struct.unpack_from("<Q", data, 56)[0] == digest(data[:56])
    assert struct.unpack_from("<Q", idx, 120)[0] == digest(idx[:120])
    index = parse_index(idx, folder / "x.idx")
    for row in range(6):
        start = int(index.columns["record"][row])
        assert start % 64 == 0 and data[start : start + 4] == b"SMPL"
        frames, height, width, channels = struct.unpack_from("<4H", data, start + 4)
        assert (frames, height, width) == tuple(int(index.columns[name][row]) for name in ("frames", "height", "width"))
        assert channels == 8 and struct.unpack_from("<Q", data, start + 16)[0] == 1000 + row
        frame = height * width * channels * 2
        metadata_end = int(index.columns["metadata_offset"][row]) + int(index.columns["metadata_length"][row])
        *hashes, last = struct.unpack_from(f"<{frames + 1}Q", data, -(-metadata_end // 64) * 64)
        at = start + 64
        assert hashes == [digest(data[at + number * frame : at + (number + 1) * frame]) for number in range(frames)]
        assert last == int(index.columns["latent_hash"][row]) == digest(struct.pack(f"<{frames}Q", *hashes))


def test_bytes_of_the_index_do_not_grow_with_the_frames(tmp_path):
    """At most 130 bytes a sample, and 40 more with a first frame; whatever its latent frames."""
    for name, encoder in (("plain", tiny_encoder()), ("pixels", tiny_encoder(first_frame=True))):
        sizes = []
        for samples in (40, 80):
            write_tiny_dataset(tmp_path / f"{name}{samples}", samples, shards=1, encoder=encoder, sizes=((13, 1, 1),))
            sizes.append((tmp_path / f"{name}{samples}" / "shard-00000.idx").stat().st_size)
        assert (sizes[1] - sizes[0]) / 40 <= 130 + 40 * encoder.first_frame
        assert sum(np.dtype(dtype).itemsize for dtype in layout.columns_of(encoder).values()) <= 70 + 40


def test_columns_survive_writing(folder, idx):
    index = parse_index(idx, folder / "x.idx")
    again = parse_index(layout.write_index(index.uuid, index.encoder, index.bin_bytes, index.columns), folder / "y.idx")
    assert again.checksum == index.checksum and again.encoder == tiny_encoder()
    for name in COLUMNS:
        assert np.array_equal(again.columns[name], index.columns[name])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_of_an_index_is_an_error_or_padding(folder, idx, data):
    byte = data.draw(st.integers(0, len(idx) - 1))
    flipped = bytearray(idx)
    flipped[byte] ^= 1 << data.draw(st.integers(0, 7))
    original = parse_index(idx, folder / "x.idx")
    try:
        index = parse_index(bytes(flipped), folder / "x.idx")
    except DataError:
        return
    assert idx[byte] == 0, "only zeros between two columns may differ"
    assert index.checksum == original.checksum
    assert all(np.array_equal(index.columns[name], original.columns[name]) for name in COLUMNS)


@pytest.mark.parametrize("length", [0, 7, 127, 128, 300, -64, -1])
def test_truncated_index(folder, idx, length):
    with pytest.raises(DataError, match="truncated"):
        parse_index(idx[:length], folder / "x.idx")


@pytest.mark.parametrize(
    ("column", "row", "value", "message"),
    [
        ("record", 2, 64, r"reach into the next record|text beyond"),
        ("record", 1, 2**63, "beyond"),
        ("frames", 0, 0, "no latents"),
        ("frames", 5, 60000, "reach into"),
        ("metadata_length", 5, 100, "hashes that reach into the next record"),
        ("height", 3, 60000, "reach into its metadata"),
        ("text_offset", 0, 65, "not aligned"),
        ("text_offset", 0, 0, "header"),
        ("text_offset", 1, 2**64 - 64, "beyond"),
        ("text_length", 0, 2**32 - 1, r"text beyond|too many"),
        ("metadata_length", 5, 2**20 + 1, r"next record|too much"),
    ],
)
def test_well_sealed_nonsense_is_refused(folder, idx, column, row, value, message):
    """An index whose checksums are right, but whose rows would read outside their record."""
    index = parse_index(idx, folder / "x.idx")
    columns = {name: values.copy() for name, values in index.columns.items()}
    columns[column][row] = value
    with pytest.raises(DataError, match=message):
        parse_index(layout.write_index(index.uuid, index.encoder, index.bin_bytes, columns), folder / "x.idx")


def test_text_of_a_later_record_is_refused(folder, idx):
    index = parse_index(idx, folder / "x.idx")
    columns = {name: values.copy() for name, values in index.columns.items()}
    columns["text_offset"][0] = columns["text_offset"][4]
    with pytest.raises(DataError, match=r"sample \d+ \(record 0\) has text beyond its own record"):
        parse_index(layout.write_index(index.uuid, index.encoder, index.bin_bytes, columns), folder / "x.idx")


def test_another_major_version_is_refused(folder, idx):
    newer = bytearray(idx)
    newer[8] = 1
    newer[120:128] = struct.pack("<Q", digest(bytes(newer[:120])))
    with pytest.raises(DataError, match=r"version 1\.0, this program reads 2\.x: encode the samples again"):
        parse_index(bytes(newer), folder / "x.idx")


def test_manifest_survives_and_refuses_edits(folder):
    manifest = read_manifest(folder)
    assert manifest.generation == 1 and finish_dataset(folder) == manifest  # nothing changed: same generation
    path = folder / "manifest.json"
    text = path.read_text()
    for old, new, message in (
        ('"samples":6', '"samples":7', "checksum"),
        ("0.7", "0.8", "checksum"),
        ('"samples":6', '"samples":-6', "samples"),
        ('"name":"shard-00000"', '"name":"../shard-00000"', "name"),
        ('"version":1', '"version":2', "version"),
        ('"generation":1', '"generation":1,"generation":2', "repeated"),
        ('"generation":1', '"generation":NaN', "NaN"),
        ("{", "[", "JSON"),
    ):
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises(DataError, match=message):
            read_manifest(folder)
    path.write_text(text)
    assert read_manifest(folder) == manifest
