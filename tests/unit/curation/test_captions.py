import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from megacogvx.curation.captions import Caption, read_captions
from megacogvx.errors import DataError


def test_json_lines_and_csv_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"video": "a.mp4", "start": 1, "end": 2.5, "caption": "A \\"red\\" disc, moving."}\n\n'
        '{"video": "b.mp4", "image_at": 0, "caption": "Déjà vu"}\n'
    )
    (tmp_path / "a.csv").write_text(
        'video,start,end,image_at,caption\na.mp4,1,2.5,,"A ""red"" disc, moving."\nb.mp4,,,0,Déjà vu\n'
    )
    rows = read_captions(tmp_path / "a.jsonl")
    assert rows == read_captions(tmp_path / "a.csv")
    assert rows == [
        Caption(video="a.mp4", start=1.0, end=2.5, caption='A "red" disc, moving.'),
        Caption(video="b.mp4", image_at=0.0, caption="Déjà vu"),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"video": "a.mp4", "start": 2, "end": 1, "caption": "c"}', "end=1.0 must be later than start=2.0"),
        ('{"video": "a.mp4", "caption": "c"}', "needs start and end, or image_at"),
        ('{"video": "a.mp4", "end": 1, "image_at": 0, "caption": "c"}', "image_at stands instead of start and end"),
        ('{"video": "a.mp4", "end": 1, "captoin": "c"}', "unknown column captoin; known: video, caption, start"),
        ('{"video": "a.mp4", "end": 1, "caption": ""}', "caption: String should have at least 1"),
        ('{"video": "a.mp4", "start": -1, "end": 1, "caption": "c"}', "start: Input should be greater"),
        ('{"video": "../a.mp4", "end": 1, "caption": "c"}', "leads out of the folder"),
        ('{"video": "/a.mp4", "end": 1, "caption": "c"}', "leads out of the folder"),
        ('{"video": "a.mp4", "end": "soon", "caption": "c"}', "end: Input should be a valid number"),
        ('{"video": "a.mp4", "end": NaN, "caption": "c"}', "end: Input should be"),
        ('{"video": "a.mp4", "end": Infinity, "caption": "c"}', "end: Input should be a finite number"),
        ("[1, 2]", "a row must be an object"),
        ("{", "Expecting property name"),
    ],
)
def test_bad_rows_are_named_by_line(tmp_path: Path, row: str, message: str) -> None:
    good = '{"video": "a.mp4", "end": 1, "caption": "c"}\n'
    (tmp_path / "c.jsonl").write_text(f"{good}{row}\n{good}{row}\n")
    with pytest.raises(DataError, match=message) as caught:
        read_captions(tmp_path / "c.jsonl")
    assert "line 2: " in str(caught.value) and "line 4: " in str(caught.value)


def test_a_bad_csv_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("video,end,caption\na.mp4,1,c,more\n")
    with pytest.raises(DataError, match="line 2"):
        read_captions(tmp_path / "c.csv")


ROWS = (
    {"video": "a.mp4", "start": 1.0, "end": 2.5, "caption": "Déjà vu"},
    {"image": "b.png", "caption": "a picture"},
)


def test_pictures_are_rows_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "a.csv").write_text(
        "\ufeffvideo,image,start,end,caption\na.mp4,,1,2.5,Déjà vu\n,b.png,,,a picture\n", encoding="utf-8"
    )
    rows = read_captions(tmp_path / "a.jsonl")
    assert rows == read_captions(tmp_path / "a.csv")
    assert rows[1] == Caption(video="b.png", image_at=0.0, caption="a picture")
    (tmp_path / "b.jsonl").write_text(
        '{"image": "b.png", "end": 1, "caption": "c"}\n{"image": "../b.png", "caption": "c"}\n'
    )
    with pytest.raises(DataError, match=r"line 1: image stands instead of.*line 2: .*leads out of the folder"):
        read_captions(tmp_path / "b.jsonl")


def test_parquet_says_the_same(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    parquet.write_table(pyarrow.Table.from_pylist([{"image": None, **ROWS[0]}, ROWS[1]]), tmp_path / "a.parquet")
    assert read_captions(tmp_path / "a.parquet") == read_captions(tmp_path / "a.jsonl")
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[:-20])
    with pytest.raises(DataError, match="not readable as Parquet"):
        read_captions(tmp_path / "a.parquet")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"megacogvx\[lists\]"):
        read_captions(tmp_path / "a.parquet")


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_broken_utf8_names_its_line(tmp_path: Path, suffix: str) -> None:
    heading = b"video,end,caption\n" if suffix == "csv" else b"\n"
    row = b"a.mp4,1,c\n" if suffix == "csv" else b'{"video": "a.mp4", "end": 1, "caption": "c"}\n'
    (tmp_path / f"c.{suffix}").write_bytes(heading + row + row.replace(b"c", b"\xc3(", 1) + row)
    with pytest.raises(DataError, match="line 3 is not UTF-8"):
        read_captions(tmp_path / f"c.{suffix}")


def test_missing_empty_and_binary_files_are_data_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_captions(tmp_path / "c.jsonl")
    (tmp_path / "c.jsonl").write_bytes(b"\n\n")
    with pytest.raises(DataError, match="holds no row"):
        read_captions(tmp_path / "c.jsonl")
    (tmp_path / "c.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="line 1 is not UTF-8"):
        read_captions(tmp_path / "c.jsonl")


def test_the_examples_captions_are_right() -> None:
    rows = read_captions(Path(__file__).parents[3] / "examples" / "data" / "captions.jsonl")
    assert {row.video for row in rows} == {"bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4"}
    assert any(row.image_at is not None for row in rows)
    parts = sorted((row.video, row.start, row.end) for row in rows if row.end is not None)
    for (video, _, end), (next_video, start, _) in pairwise(parts):
        assert video != next_video or end <= start, "parts of one video don't overlap"


def test_rows_may_end_with_a_carriage_return_and_captions_hold_line_ends(tmp_path: Path) -> None:
    for ends in ("\n", "\r\n", "\r"):
        path = tmp_path / "captions.csv"
        path.write_text(ends.join(["image,caption", 'a.png,"two\nlines"', "b.png,one"]) + ends, newline="")
        assert [(row.video, row.caption) for row in read_captions(path)] == [("a.png", "two\nlines"), ("b.png", "one")]
