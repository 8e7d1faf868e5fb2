"""Writing shards: nothing half done is visible, a restart skips what is finished, equal captions are stored once."""

import itertools
import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from megacogvx.data.indexed import DatasetWriter, IndexedDataset, finish_dataset
from megacogvx.data.indexed.verify import verify_dataset
from megacogvx.errors import DataError
from megacogvx.testing.tiny_dataset import tiny_encoder, tiny_item, write_tiny_dataset

ENCODER = tiny_encoder()


def add(writer, number, size=(2, 4, 4), **changes):
    latents, text = tiny_item(number, size, writer.encoder)
    writer.add_item(**{"latents": latents, "text": text, "sample_id": number, "metadata": {}, **changes})


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_shard_appears_with_finalize_only(tmp_path):
    with DatasetWriter(tmp_path, ENCODER) as writer:
        add(writer, 1)
        assert names(tmp_path) == ["shard-00000.bin.tmp"]
        writer.finalize()
        assert writer.finished and names(tmp_path) == ["shard-00000.bin", "shard-00000.idx"]
    assert names(tmp_path) == ["shard-00000.bin", "shard-00000.idx"]


def test_failed_block_leaves_nothing(tmp_path):
    def write_twice():
        with DatasetWriter(tmp_path, ENCODER) as writer:
            add(writer, 1)
            add(writer, 1)

    with pytest.raises(DataError, match="already"):
        write_twice()
    assert names(tmp_path) == []


def test_equal_captions_are_stored_once(tmp_path):
    sizes = ((1, 2, 2),)
    write_tiny_dataset(tmp_path / "one", 40, shards=1, sizes=sizes, captions=1)
    write_tiny_dataset(tmp_path / "many", 40, shards=1, sizes=sizes, captions=40)
    text_bytes = 6 * 8 * 2  # 96, in 128 of the file
    one, many = ((tmp_path / name / "shard-00000.bin").stat().st_size for name in ("one", "many"))
    assert many - one == 39 * 128 > 39 * text_bytes
    dataset = IndexedDataset(tmp_path / "one")
    assert len(set(dataset.shards[0].index.columns["text_offset"].tolist())) == 1
    assert torch.equal(dataset.sample(39).text, dataset.sample(0).text)
    assert dataset.sample(39).text.data_ptr() == dataset.sample(0).text.data_ptr()


def test_restart_keeps_finished_and_replaces_half_written(tmp_path):
    with DatasetWriter(tmp_path, ENCODER, 0) as writer:
        add(writer, 1)
        writer.finalize()
    before = (tmp_path / "shard-00000.bin").read_bytes()
    (tmp_path / "shard-00001.bin.tmp").write_bytes(b"half a shard")
    (tmp_path / "shard-00001.bin").write_bytes(b"renamed, but its index was never written")
    again = DatasetWriter(tmp_path, ENCODER, 0)
    assert again.finished and len(again) == 1
    again.finalize()
    assert (tmp_path / "shard-00000.bin").read_bytes() == before
    with DatasetWriter(tmp_path, ENCODER, 1) as writer:
        assert not writer.finished
        add(writer, 2)
        writer.finalize()
    assert names(tmp_path) == ["shard-00000.bin", "shard-00000.idx", "shard-00001.bin", "shard-00001.idx"]
    finish_dataset(tmp_path)
    assert not verify_dataset(tmp_path).problems and len(IndexedDataset(tmp_path)) == 2


def in_child(work):
    """Run `work` in a forked process; returns its wait status (0: it returned)."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("call", range(1, 10))
def test_killed_at_any_sync_or_rename_then_restarted(tmp_path, call):
    """Killed before the nth sync or rename, of nine in all: the next run finishes, and the data are whole."""

    def write_until_killed():
        calls = itertools.count(1)

        def killing(function):
            def wrapped(*args):
                if next(calls) == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args)

            return wrapped

        os.fsync, Path.replace = killing(os.fsync), killing(Path.replace)
        write_tiny_dataset(tmp_path, 4, shards=1)

    assert os.WTERMSIG(in_child(write_until_killed)) == signal.SIGKILL
    assert (tmp_path / "shard-00000.idx").exists() == (call > 5)
    write_tiny_dataset(tmp_path, 4, shards=1)
    report = verify_dataset(tmp_path)
    assert report.samples == 4
    assert not report.problems
    assert not list(tmp_path.glob("*.bin.tmp"))


def test_two_writers_of_one_shard(tmp_path):
    with DatasetWriter(tmp_path, ENCODER) as first:
        add(first, 1)
        with pytest.raises(DataError, match="another process is writing shard shard-00000"):
            DatasetWriter(tmp_path, ENCODER)
        with DatasetWriter(tmp_path, ENCODER, 1) as second:  # its own shard is fine
            add(second, 2)
        first.finalize()
    finish_dataset(tmp_path)
    assert IndexedDataset(tmp_path).sample_id.tolist() == [1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": torch.zeros(1, 4, 4, 8)}, "bf16"),
        ({"latents": torch.zeros(1, 4, 4, 4).bfloat16()}, r"\[T, h, w, 8\]"),
        ({"latents": torch.zeros(0, 4, 4, 8).bfloat16()}, "latents"),
        ({"text": torch.zeros(5, 8).bfloat16()}, "exactly 6"),
        ({"text": torch.zeros(6, 7).bfloat16()}, r"\[L, 8\]"),
        ({"sample_id": -1}, "2\\^64"),
        ({"sample_id": 7}, "already"),
        ({"metadata": {"x": {1, 2}}}, "JSON"),
        ({"metadata": {"x": float("nan")}}, "JSON"),
        ({"metadata": {"x": "y" * 2**20}}, "limit"),
    ],
)
def test_items_that_do_not_fit(tmp_path, changes, message):
    with DatasetWriter(tmp_path, ENCODER) as writer:
        add(writer, 7)
        with pytest.raises(DataError, match=message):
            add(writer, 8, **changes)
        add(writer, 9)
        writer.finalize()
    finish_dataset(tmp_path)
    assert verify_dataset(tmp_path).samples == 2 and not verify_dataset(tmp_path).problems


def test_real_text_has_its_own_length_up_to_the_limit(tmp_path):
    with DatasetWriter(tmp_path, tiny_encoder("real")) as writer:
        add(writer, 1, text=torch.ones(3, 8).bfloat16())
        with pytest.raises(DataError, match="at most 6"):
            add(writer, 2, text=torch.ones(7, 8).bfloat16())
        writer.finalize()
    finish_dataset(tmp_path)
    assert IndexedDataset(tmp_path).text_length.tolist() == [3]


def test_another_encoder_is_refused(tmp_path):
    write_tiny_dataset(tmp_path, 4, shards=1)
    other = tiny_encoder(vae_fingerprint="another")
    with pytest.raises(DataError, match="vae_fingerprint='vae-of-tests' and 'another'"):
        DatasetWriter(tmp_path, other, 0)
    with DatasetWriter(tmp_path, other, 1) as writer:
        add(writer, 99)
        writer.finalize()
    with pytest.raises(DataError, match="vae_fingerprint"):
        finish_dataset(tmp_path)


def test_manifest_generations_and_missing_shards(tmp_path):
    with pytest.raises(DataError, match="no finished shard"):
        finish_dataset(tmp_path)
    write_tiny_dataset(tmp_path, 4, shards=1)
    with pytest.raises(DataError, match="shard-00007"):
        finish_dataset(tmp_path, ["shard-00000", "shard-00007"])
    with DatasetWriter(tmp_path, ENCODER, 1) as writer:
        add(writer, 1)
        writer.finalize()
    assert len(IndexedDataset(tmp_path)) == 4  # appended data show with the next manifest only
    assert finish_dataset(tmp_path).generation == 2
    assert len(IndexedDataset(tmp_path)) == 5


@pytest.mark.parametrize("name", ["../escape", "a/b", "", "a.b", "x" * 65])
def test_shard_names_stay_in_the_folder(tmp_path, name):
    with pytest.raises(DataError, match="must match"):
        DatasetWriter(tmp_path / "data", ENCODER, name)


def test_full_disk_names_the_shard(tmp_path):
    def write_too_much():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        with pytest.raises(DataError, match=r"cannot write shard shard-00000 of .* bytes so far"):
            write_tiny_dataset(tmp_path, 40, shards=1)

    assert in_child(write_too_much) == 0
    assert names(tmp_path) == []
