"""Field dtypes, token ids and first frames: what is written is read, checked, copied, recovered and exchanged."""

import struct

import numpy as np
import pytest
import torch

from megacogvx.data.exchange.exporters import export_folder
from megacogvx.data.exchange.importers import import_samples, read_folder
from megacogvx.data.indexed import DatasetWriter, IndexedDataset, finish_dataset, layout
from megacogvx.data.indexed.fields import field_dtype, to_field
from megacogvx.data.indexed.layout import digest
from megacogvx.data.indexed.recover import recover_shard
from megacogvx.data.indexed.rewrite import copy_samples, merge_datasets
from megacogvx.data.indexed.verify import verify_dataset
from megacogvx.data.indexed.writer import shard_name
from megacogvx.errors import DataError
from megacogvx.testing.tiny_dataset import SIZES, tiny_encoder, tiny_image, tiny_item, write_tiny_dataset

KINDS = {
    "fp8 latents": tiny_encoder(latent_dtype="fp8_e4m3", first_frame=True),
    "fp8 everywhere": tiny_encoder("real", latent_dtype="fp8_e5m2", text_dtype="fp8_e4m3"),
    "ids": tiny_encoder("token_ids", first_frame=True),
    "short ids": tiny_encoder("token_ids", text_dtype="int16"),
}


def same(found, number, encoder, first_id=1000):
    """Whether a record is what `write_tiny_dataset` wrote as sample `number`."""
    latents, text = tiny_item(first_id + number, SIZES[number % len(SIZES)], encoder)
    image = tiny_image(first_id + number, SIZES[number % len(SIZES)]) if encoder.first_frame else None
    assert found.latents.dtype == latents.dtype and found.text.dtype == text.dtype
    assert torch.equal(found.latents.view(torch.uint8), latents.view(torch.uint8))
    assert torch.equal(found.text.view(torch.uint8), text.view(torch.uint8))
    assert (found.first_frame is None) == (image is None)
    assert image is None or torch.equal(found.first_frame, image)
    return True


@pytest.mark.parametrize("access", ["mmap", "pread"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_field_is_read_as_it_was_written(tmp_path, kind, access):
    encoder = write_tiny_dataset(tmp_path, 8, encoder=KINDS[kind])
    dataset = IndexedDataset(tmp_path, access=access)
    assert dataset.encoder == encoder and not verify_dataset(tmp_path).problems
    assert all(same(dataset.sample(number, first_frame=True), number, encoder) for number in range(8))
    assert dataset.has_first_frame().all() == encoder.first_frame
    assert dataset.sample(0).first_frame is None, "pixels are read where they are asked for"
    middle = dataset.sample(3, range(2, 4)).latents
    assert torch.equal(middle.view(torch.uint8), dataset.sample(3).latents[2:4].view(torch.uint8))


def test_documented_bytes_of_a_first_frame(tmp_path):
    """Reads them with plain `struct`, as the docstring of layout.py says."""
    write_tiny_dataset(tmp_path, 2, shards=1, encoder=KINDS["ids"])
    data = (tmp_path / "shard-00000.bin").read_bytes()
    assert struct.unpack_from("<HH", data, 40) == (0, 4), "bf16 is 0, int32 as in Megatron-LM"
    columns = IndexedDataset(tmp_path).shards[0].index.columns
    at, record = int(columns["image_offset"][0]), int(columns["record"][0])
    assert data[record : record + 4] == b"SMPI"
    assert at % 64 == 0 and data[at - 64 : at - 60] == b"FRST"
    pixels = data[at : at + 32 * 32 * 3]
    assert struct.unpack_from("<HHIQQ", data, at - 60) == (32, 32, 3, 1000, digest(pixels))
    assert pixels == tiny_image(1000, SIZES[0]).numpy().tobytes()
    assert sum(np.dtype(dtype).itemsize for dtype in layout.IMAGE_COLUMNS.values()) <= 40


def test_a_flipped_pixel_is_found_when_pixels_are_read(tmp_path):
    write_tiny_dataset(tmp_path, 2, shards=1, encoder=KINDS["ids"])
    at = int(IndexedDataset(tmp_path).shards[0].index.columns["image_offset"][1])
    path = tmp_path / "shard-00000.bin"
    data = bytearray(path.read_bytes())
    data[at + 5] ^= 1
    path.write_bytes(data)
    dataset = IndexedDataset(tmp_path)
    dataset.sample(0, first_frame=True), dataset.sample(1)
    with pytest.raises(DataError, match=r"sample 1001.*the first frame is damaged"):
        dataset.sample(1, first_frame=True)
    once = IndexedDataset(tmp_path, verify="once")
    once.sample(1)
    with pytest.raises(DataError, match="the first frame is damaged"):  # the first look didn't see the pixels
        once.sample(1, first_frame=True)
    assert "the first frame is damaged" in verify_dataset(tmp_path).problems[0]
    data[at - 60] ^= 1
    path.write_bytes(data)
    assert "first frame" in verify_dataset(tmp_path).problems[0]


def test_first_frames_are_optional_sample_by_sample(tmp_path):
    encoder = tiny_encoder(first_frame=True)
    with DatasetWriter(tmp_path, encoder) as writer:
        for number in range(3):
            latents, text = tiny_item(number, (1, 4, 4), encoder)
            image = None if number == 1 else tiny_image(number, (1, 4, 4))
            writer.add_item(latents=latents, text=text, sample_id=number, metadata={}, first_frame=image)
        writer.finalize()
    finish_dataset(tmp_path)
    dataset = IndexedDataset(tmp_path)
    assert dataset.has_first_frame().tolist() == [True, False, True] and not verify_dataset(tmp_path).problems
    assert dataset.sample(1, first_frame=True).first_frame is None
    recover_shard(tmp_path, "shard-00000", encoder)
    again = IndexedDataset(tmp_path, verify="always")
    assert again.has_first_frame().tolist() == [True, False, True]
    assert torch.equal(again.sample(2, first_frame=True).first_frame, tiny_image(2, (1, 4, 4)))


@pytest.mark.parametrize("kind", ["ids", "fp8 latents"])
def test_fields_survive_merge_filter_recover_export_and_import(tmp_path, kind):
    encoder = KINDS[kind]
    write_tiny_dataset(tmp_path / "a", 4, encoder=encoder)
    write_tiny_dataset(tmp_path / "b", 4, encoder=encoder, first_id=2000)
    merge_datasets([tmp_path / "a", tmp_path / "b"], tmp_path / "both")
    assert same(IndexedDataset(tmp_path / "both").sample(5, first_frame=True), 1, encoder, first_id=2000)
    copy_samples(IndexedDataset(tmp_path / "both"), np.array([3, 5]), tmp_path / "part")
    assert same(IndexedDataset(tmp_path / "part").sample(0, first_frame=True), 3, encoder)
    (tmp_path / "part" / "shard-00000.idx").unlink()
    assert recover_shard(tmp_path / "part", "shard-00000", encoder).samples == 2
    finish_dataset(tmp_path / "part")
    assert same(IndexedDataset(tmp_path / "part").sample(1, first_frame=True), 1, encoder, first_id=2000)
    export_folder(IndexedDataset(tmp_path / "a"), tmp_path / "files")
    import_samples(read_folder(tmp_path / "files"), tmp_path / "back", encoder, shard_bytes=10**6, name=shard_name)
    finish_dataset(tmp_path / "back")
    assert same(IndexedDataset(tmp_path / "back").sample(2, first_frame=True), 2, encoder)


def test_a_damaged_first_frame_is_lost_in_recovery_and_its_neighbours_are_not(tmp_path):
    encoder = write_tiny_dataset(tmp_path, 3, shards=1, encoder=KINDS["ids"])
    at = int(IndexedDataset(tmp_path).shards[0].index.columns["image_offset"][1])
    path = tmp_path / "shard-00000.bin"
    data = bytearray(path.read_bytes())
    data[at + 7] ^= 8
    path.write_bytes(data)
    report = recover_shard(tmp_path, "shard-00000", encoder)
    assert (report.samples, report.lost) == (2, [1])


def test_what_does_not_fit_is_refused(tmp_path):
    latents, text = tiny_item(1, (1, 4, 4), tiny_encoder())
    image = tiny_image(1, (1, 4, 4))

    def add(encoder, **changes):
        with DatasetWriter(tmp_path, encoder) as writer:
            writer.add_item(**{"latents": latents, "text": text, "sample_id": 1, "metadata": {}, **changes})

    with pytest.raises(DataError, match="first_frame=false takes no first frame"):
        add(tiny_encoder(), first_frame=image)
    with pytest.raises(DataError, match=r"uint8 \[H, W, 3\]"):
        add(tiny_encoder(first_frame=True), first_frame=image.float())
    with pytest.raises(DataError, match="latents must be fp8_e4m3"):
        add(tiny_encoder(latent_dtype="fp8_e4m3"))
    with pytest.raises(DataError, match=r"text must be int32 \[L\]"):
        add(tiny_encoder("token_ids"))
    with pytest.raises(DataError, match="exactly 6"):
        add(tiny_encoder("token_ids"), text=torch.zeros(5, dtype=torch.int32))
    with pytest.raises(ValueError, match="token_ids are int16"):
        tiny_encoder("token_ids", text_dtype="bf16")
    with pytest.raises(ValueError, match="don't go together"):
        tiny_encoder("padded", text_dtype="int32")


def test_values_beyond_an_8_bit_float_become_its_largest():
    values = torch.tensor([1e6, -1e6, 0.3, -30.0])
    for name, limit in (("fp8_e4m3", 448.0), ("fp8_e5m2", 57344.0)):
        stored = to_field(values, name)
        assert stored.dtype == field_dtype(name)
        assert stored.float()[:2].tolist() == [limit, -limit]
        assert torch.allclose(stored.float()[2:], values[2:], rtol=0.13)
