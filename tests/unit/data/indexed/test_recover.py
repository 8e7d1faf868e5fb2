"""A rebuilt index holds the records that are whole, latents included, and their checksums as they were written."""

import pytest

from megacogvx.data.indexed import IndexedDataset, finish_dataset
from megacogvx.data.indexed.recover import recover_shard
from megacogvx.data.indexed.verify import verify_dataset
from megacogvx.testing.tiny_dataset import write_tiny_dataset


@pytest.mark.parametrize(("column", "offset"), [("record", 64 + 3), ("text_offset", 3)], ids=["latents", "text"])
def test_a_damaged_field_is_lost_and_the_rest_is_what_it_was(tmp_path, column, offset):
    encoder = write_tiny_dataset(tmp_path, 6, shards=1)
    sound = IndexedDataset(tmp_path).shards[0].index.columns
    path = tmp_path / "shard-00000.bin"
    data = bytearray(path.read_bytes())
    data[int(sound[column][2]) + offset] ^= 1
    path.write_bytes(data)
    report = recover_shard(tmp_path, "shard-00000", encoder)
    assert (report.samples, report.lost) == (5, [2])
    finish_dataset(tmp_path)
    found = IndexedDataset(tmp_path).shards[0].index.columns
    for name, column in sound.items():
        assert found[name].tolist() == [value for row, value in enumerate(column.tolist()) if row != 2]
    assert not verify_dataset(tmp_path).problems
