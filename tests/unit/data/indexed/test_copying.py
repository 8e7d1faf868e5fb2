"""`read_into` and `sample_in` give the bytes that `sample` gives, and refuse what it refuses."""

import numpy as np
import pytest
import torch

from megacogvx.data.indexed import IndexedDataset
from megacogvx.data.indexed.layout import aligned, digest, sealed_hashes
from megacogvx.data.indexed.verify import verify_dataset
from megacogvx.errors import DataError
from megacogvx.testing.tiny_dataset import write_tiny_dataset


@pytest.fixture
def folder(tmp_path):
    write_tiny_dataset(tmp_path / "dataset", 12, captions=5)
    return tmp_path / "dataset"


def flip(path, byte):
    data = bytearray(path.read_bytes())
    data[byte] ^= 4
    path.write_bytes(data)


def raw(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().ravel()


@pytest.mark.parametrize("access", ["mmap", "pread"])
@pytest.mark.parametrize("verify", ["always", "once", "never"])
@pytest.mark.parametrize("frames", [None, range(0, 1), range(1, 3)])
def test_copies_equal_the_sample(folder, verify, access, frames):
    """Captions repeat, so that some texts lie in an earlier record."""
    dataset = IndexedDataset(folder, verify, access)
    for number in [n for n in range(12) if frames is None or dataset.frames[n] >= frames.stop]:
        record, out = IndexedDataset(folder).sample(number, frames), np.full(1 << 14, 7, np.uint8)
        end = dataset.read_into(number, out, frames)
        latents, text = raw(record.latents), raw(record.text)
        assert np.array_equal(out[: len(latents)], latents)
        assert np.array_equal(out[aligned(len(latents)) :][: len(text)], text)
        assert end == aligned(len(latents)) + aligned(len(text))
        assert (out[end:] == 7).all()
        held = dataset.sample_in(lambda size: torch.zeros(size, dtype=torch.uint8), number, frames)
        assert torch.equal(held.latents, record.latents) and torch.equal(held.text, record.text)
        assert (held.sample_id, held.metadata) == (record.sample_id, record.metadata)


@pytest.mark.parametrize("access", ["mmap", "pread"])
@pytest.mark.parametrize(
    ("column", "shift", "what"),
    [("record", 64, "latent frame 0"), ("text_offset", 0, "the text"), ("metadata_offset", 0, "the metadata")],
)
def test_a_flipped_bit_is_named(folder, access, column, shift, what):
    flip(folder / "shard-00000.bin", int(IndexedDataset(folder).shards[0].index.columns[column][2]) + shift)
    out = np.empty(1 << 14, np.uint8)
    with pytest.raises(DataError, match=rf"shard-00000\.bin: sample 1002 \(record 2\): {what} is damaged"):
        IndexedDataset(folder, access=access).read_into(2, out)
    IndexedDataset(folder, access=access).read_into(3, out)
    IndexedDataset(folder, "never", access).read_into(2, out)


def test_once_compares_until_the_whole_sample_was_seen(folder):
    dataset, out = IndexedDataset(folder, "once"), np.empty(1 << 14, np.uint8)
    dataset.read_into(3, out, range(0, 1))
    dataset.read_into(2, out)
    for row in (2, 3):
        flip(folder / "shard-00000.bin", int(dataset.shards[0].index.columns["record"][row]) + 64)
    dataset.read_into(2, out)
    with pytest.raises(DataError, match="1003"):
        dataset.read_into(3, out)


def test_a_file_that_was_cut_is_an_error_not_a_signal(folder):
    dataset, out = IndexedDataset(folder), np.empty(1 << 14, np.uint8)
    dataset.read_into(0, out)
    with (folder / "shard-00000.bin").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(DataError, match="to 100 bytes while in use"):
        dataset.read_into(5, out)


@pytest.mark.parametrize("access", ["mmap", "pread"])
def test_checksums_that_agree_with_damaged_latents_are_found_by_the_index(folder, access):
    """Latents, their checksum and the checksum behind these are all replaced: the chain ends in the index."""
    index, path = IndexedDataset(folder).shards[0].index, folder / "shard-00000.bin"
    record, frames, notes, length = (
        int(index.columns[name][1]) for name in ("record", "frames", "metadata_offset", "metadata_length")
    )
    data, hashes = bytearray(path.read_bytes()), aligned(notes + length)
    cells = int(index.columns["height"][1]) * int(index.columns["width"][1])
    size = cells * index.encoder.frame_cell_bytes
    data[record + 64] ^= 1
    found = [digest(data[record + 64 + n * size : record + 64 + (n + 1) * size]) for n in range(frames)]
    forged = sealed_hashes(found)
    data[hashes : hashes + len(forged)] = forged
    path.write_bytes(data)
    dataset, what = IndexedDataset(folder, access=access), r"sample 1001 .*list of the latents' checksums is damaged"
    with pytest.raises(DataError, match=what):
        dataset.read_into(1, np.empty(1 << 14, np.uint8))
    with pytest.raises(DataError, match=what):
        dataset.sample(1, range(1, 2))
    assert any("checksum behind" in problem for problem in verify_dataset(folder).problems)


@pytest.mark.parametrize("verify", ["always", "never"])
def test_a_cut_file_is_an_error_that_names_the_sample(folder, verify):
    path = folder / "shard-00000.bin"
    dataset = IndexedDataset(folder, verify, "pread")
    path.write_bytes(path.read_bytes()[: int(dataset.shards[0].index.columns["record"][4])])
    ways = (
        lambda number: dataset.sample(number),
        lambda number: dataset.read_into(number, np.empty(1 << 14, np.uint8)),
        lambda number: dataset.sample_in(lambda size: torch.empty(size, dtype=torch.uint8), number),
    )
    for way in ways:
        way(3)
        with pytest.raises(DataError, match=r"shard-00000\.bin: sample 1004 \(record 4\): .*ends at byte .*truncated"):
            way(4)
