"""Reading: what was written comes back without a copy, and no damage goes unnoticed."""

import gc
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megacogvx.data.indexed import IndexedDataset, manifest, reader
from megacogvx.errors import DataError
from megacogvx.testing.tiny_dataset import SIZES, tiny_encoder, tiny_item, write_tiny_dataset


@pytest.fixture
def folder(tmp_path):
    write_tiny_dataset(tmp_path / "dataset", 12)
    return tmp_path / "dataset"


def flip(path, byte, bit=0):
    with path.open("r+b") as file:
        file.seek(byte)
        value = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([value ^ 1 << bit]))


@pytest.mark.parametrize("verify", ["always", "once", "never"])
@pytest.mark.parametrize("kind", ["padded", "real"])
def test_everything_comes_back(tmp_path, verify, kind):
    encoder = write_tiny_dataset(tmp_path, 12, encoder=tiny_encoder(kind))
    dataset = IndexedDataset(tmp_path, verify)
    assert len(dataset) == 12 and dataset.manifest.encoder == encoder and dataset.encoder.latent_scale_factor == 0.7
    for number in range(12):
        latents, text = tiny_item(1000 + number, SIZES[number % 4], encoder)
        record = dataset.sample(number)
        assert torch.equal(record.latents, latents) and torch.equal(record.text, text)
        assert record.sample_id == 1000 + number == int(dataset.sample_id[number])
        assert record.metadata == {"number": number, "caption": f"caption {number % 5}"}
        sizes = (dataset.frames[number], dataset.height[number], dataset.width[number], dataset.text_length[number])
        assert tuple(map(int, sizes)) == (*latents.shape[:3], len(text))


def test_some_frames_only(folder):
    dataset = IndexedDataset(folder)
    whole = dataset.sample(3).latents
    assert torch.equal(dataset.sample(3, range(1, 4)).latents, whole[1:4])


def test_tensors_are_aligned_views_that_outlive_the_dataset(folder):
    dataset = IndexedDataset(folder)
    record, twin = dataset.sample(3), dataset.sample(3)
    assert record.latents.data_ptr() == twin.latents.data_ptr()  # no copy
    assert record.latents.data_ptr() % 64 == 0 and record.text.data_ptr() % 64 == 0
    expected = record.latents.clone()
    del dataset, twin
    gc.collect()
    assert torch.equal(record.latents, expected)


def test_writing_into_a_view_does_not_reach_the_file(folder):
    before = (folder / "shard-00000.bin").read_bytes()
    IndexedDataset(folder).sample(0).latents.zero_()
    assert (folder / "shard-00000.bin").read_bytes() == before
    assert IndexedDataset(folder).sample(0).latents.abs().sum() > 0


def spans(dataset, row):
    columns = dataset.shards[0].index.columns
    return {
        "latent frame 0": int(columns["record"][row]) + 64,
        "the text": int(columns["text_offset"][row]),
        "the metadata": int(columns["metadata_offset"][row]),
    }


@pytest.mark.parametrize("what", ["latent frame 0", "the text", "the metadata"])
def test_flipped_bit_names_shard_and_sample(folder, what):
    flip(folder / "shard-00000.bin", spans(IndexedDataset(folder), 2)[what] + 1)
    dataset = IndexedDataset(folder)
    with pytest.raises(DataError, match=rf"shard-00000\.bin: sample 1002 \(record 2\): {what} is damaged"):
        dataset.sample(2)
    dataset.sample(3)
    assert IndexedDataset(folder, "never").sample(2) is not None


def test_flip_in_an_unread_frame_is_not_read(folder):
    """Checksums are per frame: a rank that needs other frames neither reads nor trips over this one."""
    dataset = IndexedDataset(folder)
    frame = 4 * 4 * 8 * 2
    flip(folder / "shard-00000.bin", spans(dataset, 3)["latent frame 0"] + 4 * frame)
    dataset.sample(3, range(0, 4))
    with pytest.raises(DataError, match="latent frame 4"):
        dataset.sample(3, range(4, 5))


def test_once_looks_at_the_first_read_only(folder):
    once, always = IndexedDataset(folder, "once"), IndexedDataset(folder, "always")
    once.sample(3, range(0, 1)), once.sample(2), always.sample(2)
    for row in (2, 3):
        flip(folder / "shard-00000.bin", spans(once, row)["latent frame 0"])
    once.sample(2)
    with pytest.raises(DataError, match="1003"):  # only part of it was looked at
        once.sample(3)
    with pytest.raises(DataError, match="1002"):
        always.sample(2)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_flipped_bit_is_silent(folder, data):
    path = folder / "shard-00000.bin"
    byte, bit = data.draw(st.integers(0, path.stat().st_size - 1)), data.draw(st.integers(0, 7))
    good = [(r.latents.clone(), r.text.clone(), r.metadata) for r in map(IndexedDataset(folder).sample, range(6))]
    flip(path, byte, bit)
    message = "shard-00000"
    try:
        dataset = IndexedDataset(folder)
        for number, (latents, text, metadata) in enumerate(good):
            record = dataset.sample(number)
            assert torch.equal(record.latents, latents)
            assert torch.equal(record.text, text)
            assert record.metadata == metadata
    except DataError as error:
        message = str(error)
    flip(path, byte, bit)
    assert "shard-00000" in message


@pytest.mark.parametrize("suffix", ["bin", "idx"])
@pytest.mark.parametrize("cut", [1, 64, 700])
def test_truncated_file(folder, suffix, cut):
    path = folder / f"shard-00001.{suffix}"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - cut)
    with pytest.raises(DataError, match=rf"shard-00001\.{suffix} (has|is)"):
        IndexedDataset(folder)


def test_file_cut_while_in_use(folder):
    dataset = IndexedDataset(folder)
    dataset.sample(0)
    with (folder / "shard-00000.bin").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(DataError, match="to 100 bytes while in use"):
        dataset.sample(5)


def test_files_of_other_shards(folder, tmp_path):
    """Two shards of equal sizes: only uuid and checksums tell them apart."""
    write_tiny_dataset(tmp_path / "other", 12, first_id=2000)
    good = folder / "shard-00000.bin"
    shutil.copy(good, tmp_path / "kept")
    assert good.stat().st_size == (tmp_path / "other" / "shard-00000.bin").stat().st_size
    shutil.copy(tmp_path / "other" / "shard-00000.bin", good)
    with pytest.raises(DataError, match="uuid"):
        IndexedDataset(folder)
    shutil.copy(tmp_path / "other" / "shard-00000.idx", folder / "shard-00000.idx")  # a pair, but not the listed one
    with pytest.raises(DataError, match=r"isn't the one that manifest\.json lists"):
        IndexedDataset(folder)


@pytest.mark.parametrize("name", ["manifest.json", "shard-00000.bin", "shard-00000.idx"])
def test_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(DataError, match=name.split(".")[0]):
        IndexedDataset(folder)


def open_files(folder: Path) -> list[str]:
    """Return the files in `folder` that this process holds open; what else it has open is of other tests."""
    descriptors = Path("/proc/self/fd").iterdir()
    targets = [os.readlink(one) for one in descriptors if one.is_symlink()]
    return [target for target in targets if target.startswith(f"{folder.resolve()}/")]


def test_many_shards_neither_hold_files_open_nor_stay_mapped(tmp_path, monkeypatch):
    """A process may open 1,024 files and map 65,530, a corpus of 50 million clips has 50,000 shards."""
    monkeypatch.setattr(reader, "OPEN_SHARDS", 3)
    write_tiny_dataset(tmp_path, 24, shards=12)
    dataset = IndexedDataset(tmp_path)
    assert open_files(tmp_path) == []
    kept = [dataset.sample(number) for number in range(24)]
    assert [number for number, shard in enumerate(dataset.shards) if "source" in vars(shard)] == [9, 10, 11]
    assert torch.equal(kept[0].latents, dataset.sample(0).latents) and "source" in vars(dataset.shards[0])
    del kept
    gc.collect()
    assert len(open_files(tmp_path)) == 3


def test_a_large_index_is_mapped_and_holds_no_file_open(folder, monkeypatch):
    plain = IndexedDataset(folder)
    monkeypatch.setattr(manifest, "MAPPED_BYTES", 1)
    mapped = IndexedDataset(folder)
    assert open_files(folder) == []
    assert np.array_equal(mapped.sample_id, plain.sample_id)
    assert torch.equal(mapped.sample(3).latents, plain.sample(3).latents)
    last = mapped.shards[-1]
    last.path.unlink()
    with pytest.raises(DataError, match=rf"{last.name}\.bin: sample \d+ .*can't be mapped: .*No such file"):
        mapped.sample(11)


@pytest.mark.parametrize("access", ["mmap", "pread"])
def test_metadata_alone_need_no_tensors(folder, access):
    plain = IndexedDataset(folder)
    rows = range(len(plain.shards[0].index))
    expected = [plain.sample(row).metadata for row in rows]
    for row in rows:
        flip(folder / "shard-00000.bin", spans(plain, row)["latent frame 0"])
    dataset = IndexedDataset(folder, access=access)
    assert [dataset.metadata(row) for row in rows] == expected
    flip(folder / "shard-00000.bin", spans(dataset, 0)["the metadata"] + 5)
    with pytest.raises(DataError, match=rf"shard-00000\.bin: sample {plain.sample_id[0]} .*: the metadata is damaged"):
        IndexedDataset(folder, access=access).metadata(0)
