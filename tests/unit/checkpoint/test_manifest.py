"""Whatever changes in a checkpoint's folder, its manifest tells, and names the file."""

import json

import pytest

from megacogvx.checkpoint.directory import CheckpointDirectory
from megacogvx.checkpoint.manifest import MANIFEST, files_of, manifest_text, read_manifest, seal, verify
from megacogvx.errors import CheckpointError


@pytest.fixture
def path(tmp_path):
    """A checkpoint of step 1, of two files, one in a folder of its own."""
    directory = CheckpointDirectory(tmp_path / "checkpoints")
    partial = directory.begin(1)
    (partial / "inner").mkdir()
    (partial / "tensors.bin").write_bytes(b"weights")
    (partial / "inner" / "more.bin").write_bytes(b"more")
    return directory.commit(1, {name: seal(partial, name) for name in files_of(partial)})


@pytest.mark.parametrize("name", ["tensors.bin", "inner/more.bin"])
def test_a_flipped_bit_is_named(path, name):
    content = bytearray((path / name).read_bytes())
    content[2] ^= 1
    (path / name).write_bytes(content)
    assert CheckpointDirectory(path.parent).steps() == [1], "only the checksum can tell"
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        verify(path)


def test_missing_short_and_foreign_files_are_named(path):
    (path / "extra.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"extra\.bin is not in"):
        verify(path)
    (path / "extra.bin").unlink()
    (path / "tensors.bin").write_bytes(b"weight")
    with pytest.raises(CheckpointError, match="has 6 bytes instead of 7"):
        verify(path)
    (path / "tensors.bin").unlink()
    with pytest.raises(CheckpointError, match=r"tensors\.bin is missing"):
        verify(path)
    verify(path, ["inner/more.bin"])


def test_foreign_folders_say_what_is_near(path):
    with pytest.raises(CheckpointError, match="step-00000001"):
        read_manifest(path.with_name("step-00000008"))
    with pytest.raises(CheckpointError, match=r"no manifest\.json; checkpoints in .*: step-00000001"):
        read_manifest(path.parent)
    manifest = json.loads((path / MANIFEST).read_text())
    for change, match in (({"format": "x"}, "format 'x'"), ({"version": 99}, "version 99"), ({"files": [1]}, "read")):
        (path / MANIFEST).write_text(json.dumps({**manifest, **change}))
        with pytest.raises(CheckpointError, match=match):
            read_manifest(path)


def test_every_damaged_file_is_named(path):
    (path / "tensors.bin").write_bytes(b"another")
    (path / "inner" / "more.bin").unlink()
    (path / "extra.bin").touch()
    with pytest.raises(CheckpointError, match=r"extra\.bin.*more\.bin is missing.*tensors\.bin is damaged"):
        verify(path)


def test_no_bit_of_a_manifest_can_turn(path):
    text = bytearray((path / MANIFEST).read_bytes())
    for place in range(len(text)):
        for bit in range(8):
            turned = bytearray(text)
            turned[place] ^= 1 << bit
            (path / MANIFEST).write_bytes(turned)
            with pytest.raises(CheckpointError, match=MANIFEST):  # and no other file is blamed
                verify(path)


def test_links_are_foreign_whatever_they_point_at(path):
    for name, target in (("folder", path / "inner"), ("nowhere", path / "not there")):
        (path / name).symlink_to(target)
        with pytest.raises(CheckpointError, match=f"{name} is not in"):
            verify(path)
        (path / name).unlink()
    assert verify(path) == 1


def test_a_checkpoint_under_another_steps_name_is_refused(path):
    renamed = path.rename(path.with_name("step-00000006"))
    with pytest.raises(CheckpointError, match="of step 1"):
        verify(renamed)
    assert CheckpointDirectory(path.parent).steps() == []


def test_names_that_leave_the_folder_are_refused(path):
    step, entries = read_manifest(path)
    for name in ("../outside.bin", "/etc/hostname"):
        (path / MANIFEST).write_text(manifest_text(step, {**entries, name: entries["tensors.bin"]}))
        with pytest.raises(CheckpointError, match="outside the checkpoint"):
            verify(path)
