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


def test_missing_empty_and_binary_files_are_data_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_captions(tmp_path / "c.jsonl")
    (tmp_path / "c.jsonl").write_bytes(b"\n\n")
    with pytest.raises(DataError, match="holds no row"):
        read_captions(tmp_path / "c.jsonl")
    (tmp_path / "c.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        read_captions(tmp_path / "c.jsonl")


def test_the_examples_captions_are_right() -> None:
    rows = read_captions(Path(__file__).parents[3] / "examples" / "data" / "captions.jsonl")
    assert {row.video for row in rows} == {"bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4"}
    assert any(row.image_at is not None for row in rows)
    parts = sorted((row.video, row.start, row.end) for row in rows if row.end is not None)
    for (video, _, end), (next_video, start, _) in pairwise(parts):
        assert video != next_video or end <= start, "parts of one video don't overlap"
