"""A dataset at a URL reads as the same folder does; fsspec's memory file system stands for the store."""

import shutil

import fsspec
import numpy as np
import pytest
import torch

from megacogvx.data.corpus import Corpus, DataConfig
from megacogvx.data.indexed import IndexedDataset, remote
from megacogvx.data.indexed.remote import RemotePath, folder_at
from megacogvx.data.indexed.side_columns import write_side_column
from megacogvx.data.indexed.verify import verify_dataset
from megacogvx.errors import DataError
from megacogvx.testing.tiny_dataset import write_tiny_dataset

URL = "memory://bucket/dataset"


@pytest.fixture
def folder(tmp_path):
    write_tiny_dataset(tmp_path / "dataset", 12, shards=2)
    ids = IndexedDataset(tmp_path / "dataset").sample_id
    write_side_column(tmp_path / "dataset", "flow", np.arange(12.0), ids)
    return tmp_path / "dataset"


@pytest.fixture
def store(folder, monkeypatch):
    """The same files in memory, and no waiting between attempts."""
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.0)
    files = fsspec.filesystem("memory")
    files.store.clear()
    for path in folder.rglob("*.*"):
        files.pipe_file(f"/bucket/dataset/{path.relative_to(folder)}", path.read_bytes())
    yield files
    files.store.clear()


@pytest.mark.parametrize("verify", ["always", "once", "never"])
def test_reads_what_the_folder_holds(folder, store, verify):
    local, far = IndexedDataset(folder), IndexedDataset(URL, verify)
    assert far.manifest == local.manifest and np.array_equal(far.side_column("flow"), np.arange(12.0))
    out = np.zeros(1 << 14, np.uint8)
    for number in range(12):
        for frames in (None, range(0, 1)):
            a, b = local.sample(number, frames), far.sample(number, frames)
            assert torch.equal(a.latents, b.latents) and torch.equal(a.text, b.text) and a.metadata == b.metadata
            end = far.read_into(number, out, frames)
            assert end and np.array_equal(out[: a.latents.numel() * 2], a.latents.view(torch.uint8).numpy().ravel())


def test_a_corpus_blends_folders_and_urls(folder, store):
    write_tiny_dataset(folder.parent / "other", 5, first_id=9000)
    config = DataConfig(paths=((1.0, str(folder.parent / "other")), (2.0, URL)), tokens_per_pack=100)
    corpus = Corpus(config)
    assert len(corpus) == 17 and corpus.sample(16).sample_id == 1011
    with pytest.raises(DataError, match="sample id 1000 occurs 2 times"):
        Corpus(DataConfig(paths=(str(folder), URL), tokens_per_pack=100))


def test_one_request_a_sample_and_only_for_the_frames_that_are_needed(folder, store, monkeypatch):
    """The last captions are no other sample's, so that their texts lie beside their latents."""
    asked, read = [], RemotePath.read_range
    monkeypatch.setattr(RemotePath, "read_range", lambda *args: asked.append(args[1:]) or read(*args))
    dataset = IndexedDataset(URL)
    asked.clear()
    record = dataset.sample(3)
    assert len(asked) == 1
    whole = record.latents.numel() * 2 + record.text.numel() * 2
    assert whole <= asked[0][1] - asked[0][0] <= whole + 256
    start = asked[0][0]
    monkeypatch.setattr("megacogvx.data.indexed.source.REMOTE_GAP", 0)
    asked.clear()
    dataset.sample(3, range(1, 2))
    frame_bytes = record.latents[0].numel() * 2
    assert sorted(asked)[0] == (start + frame_bytes, start + 2 * frame_bytes) and len(asked) > 1


def test_a_flipped_bit_names_url_and_sample(store):
    dataset = IndexedDataset(URL)
    place = int(dataset.shards[0].index.columns["record"][2]) + 64
    data = bytearray(store.cat_file("/bucket/dataset/shard-00000.bin"))
    data[place] ^= 1
    store.pipe_file("/bucket/dataset/shard-00000.bin", bytes(data))
    with pytest.raises(DataError, match=r"memory://bucket/dataset/shard-00000\.bin: sample 1002 \(record 2\)"):
        dataset.sample(2)
    assert any("1002" in problem for problem in verify_dataset(URL).problems)


def test_a_file_cut_in_the_store_is_an_error_of_one_read(store):
    dataset = IndexedDataset(URL)
    whole = store.cat_file("/bucket/dataset/shard-00000.bin")
    store.pipe_file("/bucket/dataset/shard-00000.bin", whole[:600])
    with pytest.raises(DataError, match=r"shard-00000\.bin ends at byte \d+, \d+ are needed"):
        dataset.sample(5)
    with pytest.raises(DataError, match="has 600 bytes, its index says"):
        IndexedDataset(URL)


@pytest.mark.parametrize("failures", [1, remote.ATTEMPTS])
def test_what_fails_is_tried_again_then_told(store, monkeypatch, failures):
    dataset, files = IndexedDataset(URL), type(store)
    ask, left = files.cat_file, [failures]

    def stumbling(self, *args, **kwargs):
        if left[0]:
            left[0] -= 1
            raise ConnectionResetError("the server hung up")
        return ask(self, *args, **kwargs)

    monkeypatch.setattr(files, "cat_file", stumbling)
    if failures < remote.ATTEMPTS:
        assert dataset.sample(1).sample_id == 1001
    else:
        with pytest.raises(DataError, match=f"failed {remote.ATTEMPTS} times.*ConnectionResetError: the server hung"):
            dataset.sample(1)


def test_missing_datasets_and_protocols(store):
    with pytest.raises(DataError, match="memory://bucket/nothing is not a dataset"):
        IndexedDataset("memory://bucket/nothing")
    with pytest.raises(DataError, match="protocol nosuch:// can't be used"):
        IndexedDataset("nosuch://bucket/dataset")
    store.rm_file("/bucket/dataset/shard-00001.bin")
    with pytest.raises(DataError, match=r"shard-00001\.bin: size failed: FileNotFoundError"):
        IndexedDataset(URL)


def test_paths_stay_paths(tmp_path):
    assert folder_at(str(tmp_path)) == tmp_path and str(folder_at("s3://a/b/")) == "s3://a/b"
    shutil.rmtree(tmp_path)
