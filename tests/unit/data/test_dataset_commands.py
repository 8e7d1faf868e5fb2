"""`megacogvx data` and all of its subcommands, through the command line, with the exit status."""

import io
import json
import os
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megacogvx.cli import USER_ERROR_STATUS, main
from megacogvx.data.dataset_commands import ranks
from megacogvx.data.indexed import IndexedDataset
from megacogvx.data.indexed.side_columns import write_side_column
from megacogvx.data.indexed.verify import verify_dataset
from megacogvx.testing.tiny_dataset import tiny_encoder, write_tiny_dataset


def data(*arguments):
    return main(["data", *map(str, arguments)])


def content(folder):
    """Return everything that a dataset's samples are, by id."""
    dataset = IndexedDataset(folder)
    records = [dataset.sample(number) for number in range(len(dataset))]
    return {r.sample_id: (r.latents.float().tolist(), r.text.float().tolist(), r.metadata) for r in records}


@pytest.fixture
def source(tmp_path):
    write_tiny_dataset(tmp_path / "a", 20)
    ids = IndexedDataset(tmp_path / "a").sample_id
    write_side_column(tmp_path / "a", "flow", ids.astype(float) - 1000, ids)
    return tmp_path / "a"


def test_info_and_verify_tell_and_end_with_a_status(source, tmp_path, capsys):
    assert data("info", source) == 0
    assert "shard-00001" in capsys.readouterr().out
    assert data("verify", source) == 0
    flip(source / "shard-00001.bin", 130)
    assert data("verify", source) == USER_ERROR_STATUS
    assert "shard-00001" in capsys.readouterr().out
    assert data("info", tmp_path / "nothing") == USER_ERROR_STATUS


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_split_and_merge_give_the_same_samples_and_scores(source, tmp_path):
    train, held_out = tmp_path / "train", tmp_path / "held-out"
    assert data("split", source, "--parts", f"{train}=0.7", f"{held_out}=0.3", "--samples-per-shard", 4) == 0
    parts = [content(train), content(held_out)]
    assert parts[0] and parts[1] and not parts[0].keys() & parts[1].keys()
    assert data("merge", train, held_out, "--output", tmp_path / "merged") == 0
    assert content(tmp_path / "merged") == parts[0] | parts[1] == content(source)
    merged = IndexedDataset(tmp_path / "merged")
    assert merged.side_column("flow").tolist() == [int(i) - 1000 for i in merged.sample_id]
    assert not verify_dataset(tmp_path / "merged").problems
    assert data("merge", source, train, "--output", tmp_path / "twice") == USER_ERROR_STATUS


def test_filter_by_score_size_and_list(source, tmp_path):
    assert data("filter", source, "--where", "flow>=5", "flow<=11", "--output", tmp_path / "b") == 0
    assert sorted(content(tmp_path / "b")) == list(range(1005, 1012))
    (tmp_path / "ids").write_text("1001\n1003\n1006\n")
    assert data("filter", source, "--ids", tmp_path / "ids", "--where", "frames>=2", "--output", tmp_path / "c") == 0
    expected = [i for i in (1001, 1003, 1006) if len(content(source)[i][0]) >= 2]
    assert sorted(content(tmp_path / "c")) == expected
    assert data("filter", source, "--where", "flow>=99", "--output", tmp_path / "d") == USER_ERROR_STATUS
    assert data("filter", source, "--where", "flow=9", "--output", tmp_path / "d") == USER_ERROR_STATUS


def test_recover_rebuilds_the_index(source):
    before, index = content(source), source / "shard-00001.idx"
    original = index.read_bytes()
    index.unlink()
    assert data("recover", source) == 0
    assert index.read_bytes() == original
    assert content(source) == before and not verify_dataset(source).problems


@pytest.mark.parametrize(("column", "offset"), [("record", 20), ("metadata_offset", 0)])
def test_recover_steps_over_a_damaged_record(source, column, offset):
    dataset = IndexedDataset(source)
    lost = dataset.shards[0].index.columns[column][2]
    path = source / "shard-00000.bin"
    damaged = bytearray(path.read_bytes())
    damaged[int(lost) + offset] ^= 255
    path.write_bytes(bytes(damaged))
    before = content_without(source, 1002)
    assert data("recover", source, "--shards", "shard-00000") == 0
    assert content(source) == before
    assert (source / "shard-00000.idx.old").exists()


def content_without(folder, sample_id):
    dataset = IndexedDataset(folder)
    records = [dataset.sample(n) for n in range(len(dataset)) if int(dataset.sample_id[n]) != sample_id]
    return {r.sample_id: (r.latents.float().tolist(), r.text.float().tolist(), r.metadata) for r in records}


def test_column_from_metadata_and_from_csv(source, tmp_path):
    assert data("column", source, "--name", "number", "--from-metadata", "number") == 0
    assert IndexedDataset(source).side_column("number").tolist() == list(range(20))
    (tmp_path / "scores.csv").write_text("sample_id,score\n1004,0.5\n")
    assert data("column", source, "--name", "number", "--from-csv", tmp_path / "scores.csv") == 0
    values = IndexedDataset(source).side_column("number")
    assert values[4] == 0.5 and np.isnan(values).sum() == 19
    (tmp_path / "scores.csv").write_bytes(b"1004,0.5\n\xff\xfe,1\n")
    assert data("column", source, "--name", "number", "--from-csv", tmp_path / "scores.csv") == USER_ERROR_STATUS


def test_a_column_of_places_holds_exactly_a_fifth_from_0_8_on(source):
    assert data("column", source, "--name", "place", "--from-metadata", "number", "--rank") == 0
    assert IndexedDataset(source).side_column("place").tolist() == pytest.approx([n / 20 for n in range(20)])
    equal, ids = np.array([5.0, 5.0, np.nan, 5.0, 1.0, 5.0]), np.array([4, 1, 9, 3, 2, 8], np.uint64)
    places = ranks(equal, ids)
    assert np.isnan(places[2])
    assert places[[4, 1, 3, 0, 5]].tolist() == [0.0, 0.2, 0.4, 0.6, 0.8]


@pytest.mark.parametrize("form", ["safetensors", "webdataset"])
def test_export_and_import_give_the_same_tensors(source, tmp_path, form):
    out = tmp_path / "out"
    assert data("export", source, "--output", out, "--format", form, "--samples-per-tar", 8) == 0
    sources = sorted(out.glob("*.tar")) if form == "webdataset" else [out]
    assert data("import", *sources, "--encoder", source, "--output", tmp_path / "back", "--shard-mb", 1) == 0

    def tensors(folder):
        return sorted((latents, text, note["number"]) for latents, text, note in content(folder).values())

    assert tensors(tmp_path / "back") == tensors(source)
    assert not verify_dataset(tmp_path / "back").problems


def test_import_pt_folder_permutes_pads_and_adds_the_variance(tmp_path):
    folder = tmp_path / "pt"
    folder.mkdir()
    latents, text = torch.randn(4, 2, 6, 5), torch.randn(3, 8)  # C T H W, without a variance
    torch.save({"latents": latents, "text": text}, folder / "x.pt")
    (folder / "x.json").write_text('{"caption": "a cat"}')
    (tmp_path / "encoder.json").write_text(json.dumps(tiny_encoder().model_dump()))
    options = ("--encoder", tmp_path / "encoder.json", "--axes", "cthw", "--output", tmp_path / "new")
    assert data("import", folder, *options) == 0
    record = IndexedDataset(tmp_path / "new").sample(0)
    assert torch.equal(record.latents[..., :4], latents.permute(1, 2, 3, 0).bfloat16())
    assert (record.latents[..., 4:] == -30).all()
    assert torch.equal(record.text[:3], text.bfloat16()) and not record.text[3:].any() and len(record.text) == 6
    assert record.metadata == {"caption": "a cat", "key": "x"}


@pytest.fixture
def encoder(tmp_path):
    """A file that tells what made tensors of `[T, h, w, 8]` and `[L, 8]`."""
    (tmp_path / "encoder.json").write_text(json.dumps(tiny_encoder("real").model_dump()))
    return tmp_path / "encoder.json"


def test_import_safetensors_folder(tmp_path, encoder):
    """Files that other programs wrote: fp16 latents that were drawn already, texts of their own lengths."""
    (tmp_path / "in").mkdir()
    tensors = [{"latents": torch.randn(n, 2, 4, 4).half(), "text": torch.randn(n, 8)} for n in (1, 2)]
    for number, each in enumerate(tensors):
        save_file(each, tmp_path / "in" / f"{number}.safetensors")
    assert data("import", tmp_path / "in", "--encoder", encoder, "--output", tmp_path / "new") == 0
    dataset = IndexedDataset(tmp_path / "new")
    for number, each in enumerate(tensors):
        record = dataset.sample(number)
        assert torch.equal(record.latents[..., :4], each["latents"].bfloat16())
        assert torch.equal(record.text, each["text"].bfloat16()) and record.metadata["key"] == str(number)
    assert data("verify", tmp_path / "new") == 0
    assert data("import", tmp_path / "in", "--encoder", encoder, "--output", tmp_path / "new") == USER_ERROR_STATUS


def test_import_webdataset_tar(tmp_path, encoder):
    """A tar as WebDataset's writer names members: a folder in the key, a tensor a member, facts beside them."""
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in (("latents", (2, 2, 2, 8)), ("text", (3, 8)))}
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, tensor in tensors.items():
            _add(archive, f"part/a.{name}.pt", _saved(tensor))
        _add(archive, "part/a.json", b'{"caption": "a cat"}')
    assert data("import", tmp_path / "0.tar", "--encoder", encoder, "--output", tmp_path / "new") == 0
    record = IndexedDataset(tmp_path / "new").sample(0)
    assert torch.equal(record.latents, tensors["latents"]) and torch.equal(record.text, tensors["text"])
    assert record.metadata == {"caption": "a cat", "key": "part/a"}


def _add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


class MakesFolder:
    """Unpickled without care, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_importing_code_ends_with_an_error_and_leaves_no_dataset(tmp_path, encoder, form):
    hostile = _saved({"latents": torch.zeros(1, 2, 2, 8), "text": MakesFolder(tmp_path / "ran")})
    (tmp_path / "in").mkdir()
    if form == "folder":
        (tmp_path / "in" / "a.pt").write_bytes(hostile)
    else:
        with tarfile.open(tmp_path / "in" / "0.tar", "w") as archive:
            _add(archive, "a.pt", hostile)
    where = tmp_path / "in" / ("0.tar" if form == "tar" else "")
    assert data("import", where, "--encoder", encoder, "--output", tmp_path / "new") == USER_ERROR_STATUS
    assert not (tmp_path / "ran").exists() and not (tmp_path / "new" / "manifest.json").exists()


def write_as_megatron(prefix, sequences, code):
    """The two files as Megatron-LM's IndexedDatasetBuilder writes them."""
    sizes = np.array([len(values) for values in sequences], "<i4")
    offsets = np.cumsum([0, *(values.nbytes for values in sequences)])[:-1].astype("<i8")
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sequences), len(sequences) + 1)
    documents = np.arange(len(sequences) + 1, dtype="<i8")
    Path(f"{prefix}.idx").write_bytes(head + sizes.tobytes() + offsets.tobytes() + documents.tobytes())
    Path(f"{prefix}.bin").write_bytes(b"".join(values.tobytes() for values in sequences))


def write_with_megatron(prefix, sequences, code):
    """The two files, written by Megatron-LM itself."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype={7: np.float32, 8: np.uint16}[code])
    for values in sequences:
        builder.add_item(torch.from_numpy(values))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize(
    "write", [write_as_megatron, pytest.param(write_with_megatron, marks=pytest.mark.slow)]
)  # the second imports megatron-core, which takes seconds
def test_import_megatron(tmp_path, encoder, write):
    latents = [torch.randn(1, 2, 2, 8).bfloat16(), torch.randn(3, 2, 4, 8).bfloat16()]
    texts = [torch.randn(6, 8), torch.randn(2, 8)]
    write(tmp_path / "latents", [t.view(torch.uint16).numpy().ravel() for t in latents], 8)
    write(tmp_path / "text", [t.numpy().ravel() for t in texts], 7)
    rows = [
        {"latents": list(a.shape), "text": list(b.shape), "n": n}
        for n, (a, b) in enumerate(zip(latents, texts, strict=True))
    ]
    (tmp_path / "shapes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--megatron-text", tmp_path / "text", "--megatron-shapes", tmp_path / "shapes.jsonl")
    assert data("import", tmp_path / "latents", *options, "--encoder", encoder, "--output", tmp_path / "new") == 0
    dataset = IndexedDataset(tmp_path / "new")
    for number in range(2):
        record = dataset.sample(number)
        assert torch.equal(record.latents, latents[number]) and torch.equal(record.text, texts[number].bfloat16())
        assert record.metadata["n"] == number


def test_what_another_command_began_is_not_taken_over(source, tmp_path, capsys):
    """A filter that was interrupted left shards of its samples; one with other bounds must not keep them."""
    target = tmp_path / "filtered"
    assert data("filter", source, "--where", "flow>=5", "--output", target, "--samples-per-shard", 5) == 0
    for name in ("manifest.json", "shard-00001.idx", "shard-00002.idx"):
        (target / name).unlink()
    assert data("filter", source, "--where", "flow>=7", "--output", target, "--samples-per-shard", 5) != 0
    assert "shard-00000" in (told := capsys.readouterr().err) and "another command began this folder" in told
    assert data("filter", source, "--where", "flow>=5", "--output", target, "--samples-per-shard", 5) == 0
    assert IndexedDataset(target).sample_id.tolist() == [1000 + number for number in range(5, 20)]


def test_a_merge_goes_on_with_its_own_shards_alone(tmp_path, capsys):
    """Shards of clips of one size are equally long: their headers tell them apart."""
    for number, name in enumerate("abc"):
        write_tiny_dataset(tmp_path / name, 4, shards=1, first_id=100 * (number + 1), sizes=((1, 2, 2),))
    assert data("merge", tmp_path / "a", tmp_path / "c", "--output", tmp_path / "merged") == 0
    (tmp_path / "merged" / "manifest.json").unlink()
    for name in ("idx", "bin"):
        sizes = {(tmp_path / each / f"shard-00000.{name}").stat().st_size for each in "ab"}
        assert len(sizes) == 1
    assert data("merge", tmp_path / "b", tmp_path / "c", "--output", tmp_path / "merged") != 0
    assert "shard-00000.bin is there already and is another file" in capsys.readouterr().err
    assert data("merge", tmp_path / "a", tmp_path / "c", "--output", tmp_path / "merged") == 0


@pytest.mark.parametrize("option", ["split --parts x=1 --samples-per-shard", "export --output x --samples-per-tar"])
def test_sizes_of_files_are_positive(source, option, capsys):
    verb, *options = option.split()
    with pytest.raises(SystemExit):
        data(verb, source, *options, 0)
    assert "0 must be at least 1" in capsys.readouterr().err
