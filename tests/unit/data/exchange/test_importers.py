"""Hostile tars and pickles are refused by name, before anything of theirs runs or is written."""

import io
import os
import tarfile

import pytest
import torch

from megacogvx.data.exchange.importers import read_folder, read_tar
from megacogvx.errors import DataError


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


def test_a_view_larger_than_its_file(tmp_path):
    torch.save({"latents": torch.zeros(1).expand(10**6), "text": torch.zeros(1, 8)}, tmp_path / "a.pt")
    with pytest.raises(DataError, match="more than the file's"):
        list(read_folder(tmp_path))
