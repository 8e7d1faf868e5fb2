"""Lists of clips of which only keys are held."""

from __future__ import annotations

from pathlib import Path

import pytest
import xxhash

from megacogvx.curation import clip_list
from megacogvx.curation.clip_list import ClipList, Part, sample_id
from megacogvx.data.clips import Clip, read_clips, write_clips
from megacogvx.errors import DataError


def clip(number: int, caption: str = "a caption") -> Clip:
    return Clip(path=Path(f"{number}.png"), caption=caption, frames=1, height=8, width=8, fps=None, source="s", start=0)


def test_a_clip_listed_twice_is_one_record(caplog: pytest.LogCaptureFixture) -> None:
    first, other, second = clip(0), clip(0, "another caption of the same clip"), clip(1)
    clips = ClipList([Part(ids(part), lambda part=part: part) for part in ([first, other], [first, second])])
    assert list(clips) == clips[:] == [first, other, second] and clips[2] == second and len(clips) == 3
    assert clips.sample_ids.tolist() == [sample_id(each) for each in (first, other, second)]
    assert "left out: 1 x clip that is listed twice" in caplog.text


def test_only_the_parts_that_are_asked_for_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    parts = [[clip(number), clip(number + 10)] for number in range(10)]
    clips = ClipList([Part(ids(part), lambda part=part: read.append(parts.index(part)) or part) for part in parts])
    assert clips.checksum() and not read
    assert clips[3:6] == [*parts[1][1:], *parts[2]] and read == [1, 2]
    assert clips[4] == parts[2][0] and read == [1, 2], "what was read is kept for a while"
    for number in range(10):
        assert clips[2 * number] == parts[number][0]
    assert clips._read.cache_info().currsize == clip_list.HELD_PARTS  # type: ignore[attr-defined]


def test_a_list_in_a_file_is_read_by_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_clips(
        tmp_path / "clips.jsonl", [clip(n).model_copy(update={"path": tmp_path / f"{n}.png"}) for n in range(7)]
    )
    expected = read_clips(tmp_path)
    for part in (3, 7, 4096):
        monkeypatch.setattr(clip_list, "PART", part)
        clips = ClipList.from_file(tmp_path)
        assert list(clips) == expected and clips[5:7] == expected[5:]
        lines = "\n".join(str(sample_id(each)) for each in expected).encode()
        assert clips.checksum() == xxhash.xxh3_128_hexdigest(lines)
    monkeypatch.setattr(clip_list, "PART", 3)
    clips = ClipList.from_file(tmp_path)
    with (tmp_path / "clips.jsonl").open("ab") as file:
        file.write(b"{}\n")
    with pytest.raises(DataError, match=r"clips\.jsonl line 8 is not a row"):
        ClipList.from_file(tmp_path)
    (tmp_path / "clips.jsonl").write_bytes((tmp_path / "clips.jsonl").read_bytes()[:200])
    with pytest.raises(DataError, match="shorter while it was in use"):
        clips[0]
    (tmp_path / "clips.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match="lists no clip"):
        ClipList.from_file(tmp_path)


def ids(clips: list[Clip]) -> object:
    return ClipList.of(clips).sample_ids
