"""What a hostile file could do through a checkpoint: nothing. Each leaves a marker file if it is run."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, filesystem, metadata, planner, save

from megacogvx.checkpoint.directory import CheckpointDirectory
from megacogvx.checkpoint.manifest import files_of, seal
from megacogvx.checkpoint.reading import METADATA, SafeReader, read_common, read_metadata
from megacogvx.checkpoint.whole import load_whole
from megacogvx.errors import CheckpointError


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path):
    path = tmp_path / "marker"
    yield path
    assert not path.exists(), "the file has run code"


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A checkpoint of one linear layer, with a manifest that fits."""
    state = {f"model.{name}": tensor for name, tensor in torch.nn.Linear(2, 3).state_dict().items()}
    directory = CheckpointDirectory(tmp_path / "checkpoints")
    partial = directory.begin(1)
    save(state, storage_writer=FileSystemWriter(partial), no_dist=True)
    (partial / "state.json").write_text(json.dumps({}))
    return directory.commit(1, {name: seal(partial, name) for name in files_of(partial)})


def sealed_again(path: Path) -> None:
    """Write the manifest that the files have now, as one who makes a hostile checkpoint would."""
    directory = CheckpointDirectory(path.parent)
    partial = directory.begin(1)
    shutil.rmtree(partial)
    (path / "manifest.json").unlink()
    shutil.move(path, partial)
    directory.commit(1, {name: seal(partial, name) for name in files_of(partial)})


def rewritten(path: Path, change) -> None:
    """Change what `.metadata` holds, and the manifest with it."""
    content = read_metadata(path)
    content = change(content) or content
    (path / METADATA).write_bytes(pickle.dumps(content))
    sealed_again(path)


def test_a_good_checkpoint_is_read(checkpoint):
    model = torch.nn.Linear(2, 3)
    load_whole(checkpoint, model)
    found = read_metadata(checkpoint).state_dict_metadata
    assert {name: tuple(entry.size) for name, entry in found.items()} == {"model.weight": (3, 2), "model.bias": (3,)}


def put(content, name, value):
    object.__setattr__(content, name, value)


PLACES = {
    "alone": lambda content, evil: evil,
    "as planner data": lambda content, evil: put(content, "planner_data", evil),
    "as a tensor": lambda content, evil: content.state_dict_metadata.update(x=evil),
    "as a place": lambda content, evil: content.storage_data.update({metadata.MetadataIndex("x"): evil}),
    "as a name": lambda content, evil: put(content.storage_meta, "checkpoint_id", evil),
}


@pytest.mark.parametrize("place", PLACES)
def test_hostile_metadata_is_refused(checkpoint, marker, place):
    rewritten(checkpoint, lambda content: PLACES[place](content, Hostile(marker)))
    with pytest.raises(CheckpointError, match=r"\.metadata is refused: it asks for pathlib"):
        load_whole(checkpoint, torch.nn.Linear(2, 3))


def test_an_object_in_the_shards_is_refused(checkpoint, marker):
    """Torch would read it with weights_only=False, because `.metadata` calls the tensor an object."""
    shard = next(checkpoint.glob("*.distcp"))
    torch.save(Hostile(marker), shard)

    def call_it_an_object(content):
        for name in content.state_dict_metadata:
            content.state_dict_metadata[name] = metadata.BytesStorageMetadata()

    # written by the plain pickler, so that the class that is refused is torch's own
    rewritten(checkpoint, call_it_an_object)
    with pytest.raises(CheckpointError, match="BytesStorageMetadata"):
        load_whole(checkpoint, torch.nn.Linear(2, 3))


def test_a_hostile_shard_is_refused(checkpoint, marker):
    shard = next(checkpoint.glob("*.distcp"))
    torch.save({"weight": Hostile(marker)}, shard)

    def all_of_the_file(content):
        for place in content.storage_data.values():
            place.offset, place.length = 0, shard.stat().st_size

    rewritten(checkpoint, all_of_the_file)
    with pytest.raises(CheckpointError, match="can't be read"):
        load_whole(checkpoint, torch.nn.Linear(2, 3))


def test_a_hostile_common_file_is_refused(tmp_path, marker, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # what a user may have set for other programs
    torch.save({"optimizer": {"lr": 0.1}}, tmp_path / "common.pt")
    assert read_common(tmp_path) == {"optimizer": {"lr": 0.1}}
    torch.save({"optimizer": Hostile(marker)}, tmp_path / "common.pt")
    with pytest.raises(CheckpointError, match=r"common\.pt"):
        read_common(tmp_path)


@pytest.mark.parametrize("name", ["../other/__0_0.distcp", "/etc/hostname", "sub/__0_0.distcp"])
def test_shards_of_other_folders_are_refused(checkpoint, name):
    def point_outside(content):
        for place in content.storage_data.values():
            place.relative_path = name

    rewritten(checkpoint, point_outside)
    with pytest.raises(CheckpointError, match="no file of this folder"):
        read_metadata(checkpoint)


def code(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


TORCH_METADATA = b"\x8c\x2ftorch.distributed.checkpoint.metadata".replace(b"\x2f", bytes([37]))
ATTACKS = {
    # an attribute of an admitted class would stay changed for the whole process
    "changes a class": code(TORCH_METADATA, b"\x8c\x08Metadata\x93", b"N}\x8c\x01xK\x01s\x86b"),
    "calls a class": code(TORCH_METADATA, b"\x8c\x08Metadata\x93", b")R"),
    "makes a size anew": code(b"\x8c\x05torch\x8c\x04Size\x93", b")\x81"),
    "calls by the old way": code(b"(", TORCH_METADATA, b"\x8c\x08Metadata\x93", b"o"),
    "imports by the old way": code(b"(ios\nsystem\n"),
    "names a plain global": code(b"cbuiltins\neval\n"),
    "asks for an extension": code(b"\x82\x01"),
    "asks for a stored object": code(b"K\x01Q"),
    "is cut off": b"\x80\x04",
    "is something else": code(b"K\x01"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_a_pickle_can_ask_for_is_refused(tmp_path, attack):
    (tmp_path / METADATA).write_bytes(ATTACKS[attack])
    with pytest.raises(CheckpointError):
        read_metadata(tmp_path)
    assert not hasattr(metadata.Metadata, "x")


def test_torch_reads_through_the_same_door(checkpoint):
    assert isinstance(SafeReader(checkpoint), filesystem.FileSystemReader)
    found = SafeReader(checkpoint).read_metadata()
    assert found.storage_meta.load_id and planner.SavePlan
