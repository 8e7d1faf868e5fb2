"""verify_dataset: lists all damage of a dataset at once."""

import pytest

from megacogvx.data.indexed import DatasetWriter, IndexedDataset, finish_dataset
from megacogvx.data.indexed.verify import verify_dataset
from megacogvx.testing.tiny_dataset import tiny_item, write_tiny_dataset


@pytest.fixture
def folder(tmp_path):
    write_tiny_dataset(tmp_path / "dataset", 12)
    return tmp_path / "dataset"


def damage(path, byte):
    data = bytearray(path.read_bytes())
    data[byte] ^= 0x10
    path.write_bytes(bytes(data))


def test_sound_dataset(folder):
    report = verify_dataset(folder)
    size = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".bin", ".idx"))
    assert (report.shards, report.samples, report.bytes) == (2, 12, size) and not report.problems and not report.notes


def test_all_problems_are_listed(folder):
    starts = IndexedDataset(folder).shards[0].index.columns["record"].tolist()
    damage(folder / "shard-00000.bin", starts[1] + 64)  # a latent frame
    damage(folder / "shard-00000.bin", starts[4] + 20)  # a record's header: reading never looks at it, verifying does
    (folder / "shard-00001.bin").write_bytes(b"")
    problems = verify_dataset(folder).problems
    assert len(problems) == 3
    assert "sample 1001 (record 1): latent frame 0" in problems[0]
    assert "sample 1004" in problems[1] and "header" in problems[1]
    assert "shard-00001.bin has 0 bytes" in problems[2]


def test_ids_are_unique_over_shards(folder):
    encoder = IndexedDataset(folder).encoder
    with DatasetWriter(folder, encoder, 2) as writer:
        latents, text = tiny_item(1003, (1, 4, 4), encoder)
        writer.add_item(latents=latents, text=text, sample_id=1003, metadata={})
        writer.finalize()
    (note,) = verify_dataset(folder).notes
    assert "shard-00002 is finished but not in the manifest" in note
    finish_dataset(folder)
    assert any("sample id 1003 occurs 2 times" in problem for problem in verify_dataset(folder).problems)


def test_leftovers_are_notes(folder):
    (folder / "shard-00005.bin.tmp").touch()
    report = verify_dataset(folder)
    assert not report.problems and "shard-00005.bin.tmp" in report.notes[0]


def test_no_dataset(tmp_path):
    assert "manifest.json" in verify_dataset(tmp_path).problems[0]
