"""Hostile tars and pickles are refused by name, before anything of theirs runs or is written."""

import io
import os
import tarfile

import pytest
import torch

from megacogvx.data.exchange.importers import ImportedSample, import_samples, read_folder, read_tar
from megacogvx.data.indexed.writer import shard_name
from megacogvx.errors import DataError
from megacogvx.testing.tiny_dataset import tiny_encoder


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("../a.json", tarfile.REGTYPE, "leaves the archive"),
        ("/etc/a.json", tarfile.REGTYPE, "leaves the archive"),
        ("x/../../a.json", tarfile.REGTYPE, "leaves the archive"),
        ("a.json", tarfile.SYMTYPE, "link or a device"),
        ("a.json", tarfile.LNKTYPE, "link or a device"),
        ("a.json", tarfile.CHRTYPE, "link or a device"),
        ("noname", tarfile.REGTYPE, "KEY.SUFFIX"),
        ("a.json", tarfile.REGTYPE, "lacks a tensor"),
    ],
)
def test_members_that_are_refused(tmp_path, name, kind, message):
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, "/etc/hostname", 2 if kind == tarfile.REGTYPE else 0
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.addfile(member, io.BytesIO(b"{}"))
    with pytest.raises(DataError, match=message):
        list(read_tar(tmp_path / "x.tar"))


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_pt_file_does_not_run(tmp_path):
    marker = tmp_path / "marker"
    (tmp_path / "in").mkdir()
    torch.save({"latents": torch.zeros(1, 1, 1, 8), "text": Runs(str(marker))}, tmp_path / "in" / "a.pt")
    with pytest.raises(DataError, match=r"a\.pt can't be loaded as plain tensors"):
        list(read_folder(tmp_path / "in"))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([1, 2**15]), r"must lie in 0 .. the largest int16"),
        (torch.tensor([-1, 4]), r"must lie in 0 .. the largest int16"),
        (torch.zeros(9, dtype=torch.int64), r"not up to 6 token ids"),
        (torch.zeros(3), r"not up to 6 token ids"),
    ],
)
def test_token_ids_that_do_not_fit_are_refused(tmp_path, ids, message):
    """A narrower integer would wrap round to another token."""
    sample = ImportedSample("a", torch.zeros(1, 2, 2, 8), ids, {})
    encoder = tiny_encoder("token_ids", text_dtype="int16")
    with pytest.raises(DataError, match=message):
        import_samples([sample], tmp_path, encoder, shard_bytes=10**6, name=shard_name)


def test_a_view_larger_than_its_file(tmp_path):
    torch.save({"latents": torch.zeros(1).expand(10**6), "text": torch.zeros(1, 8)}, tmp_path / "a.pt")
    with pytest.raises(DataError, match="more than the file's"):
        list(read_folder(tmp_path))


def test_shards_of_another_import_are_not_taken_over(tmp_path):
    def imported(keys):
        text, latents = torch.zeros(4, 8), torch.zeros(1, 2, 2, 4)
        samples = (ImportedSample(key, latents, text, {}) for key in keys)
        return import_samples(samples, tmp_path, tiny_encoder(), shard_bytes=60, name=shard_name)

    assert len(imported("abcd")) == 4
    (tmp_path / "shard-00003.idx").unlink()
    assert len(imported("abcd")) == 4, "an interrupted one goes on"
    with pytest.raises(DataError, match=r"shard-00001 .* others than the 1 that belong there"):
        imported("aXcd")
