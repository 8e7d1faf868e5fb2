import argparse
import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from megacogvx.curation import clip
from megacogvx.curation.captions import Caption
from megacogvx.data.clips import read_clip, read_clips
from megacogvx.data.video import VideoInfo, read_frames, write_video
from megacogvx.errors import ConfigError, DataError
from megacogvx.testing.moving_shapes import shape_frames

ROWS: list[dict[str, object]] = [
    {"video": "a.mp4", "start": 0.0, "end": 2.0, "caption": "first"},
    {"video": "a.mp4", "start": 2.0, "end": 2.5, "caption": "short"},
    {"video": "b.mp4", "image_at": 1.0, "caption": "picture"},
]


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Two videos of 2.5 s at 16 frames per second: a.mp4 of 48 x 80 pixels, b.mp4 of 64 x 48."""
    folder = tmp_path / "videos"
    write_video(folder / "a.mp4", shape_frames(0, 40, 48, 80)[0], 16)
    write_video(folder / "b.mp4", shape_frames(1, 40, 64, 48)[0], 16)
    write_rows(folder, ROWS)
    return folder


def write_rows(folder: Path, rows: list[dict[str, object]]) -> None:
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(videos: Path, *options: str, output: str = "clips") -> Path:
    parser = argparse.ArgumentParser()
    clip.add_arguments(parser)
    target = videos.parent / output
    fixed = ["--captions", str(videos / "captions.jsonl"), "--output", str(target), "--short-sides", "32"]
    clip.run(parser.parse_args([*fixed, "--frames", "1", "9", *options]))
    return target


def test_clips_of_several_sizes_and_durations(videos: Path) -> None:
    clips = read_clips(run(videos, "--fps", "8", "16", "--short-sides", "32", "48"))
    rows = {(c.caption, c.frames, c.fps, c.height, c.width, c.start) for c in clips}
    sizes = ((32, 48), (48, 80))  # 32 x 53.3 cropped to multiples of 16
    assert rows == (
        {("first", 9, 8.0, *size, 0.0) for size in sizes}  # the next would end at 2.125 s
        | {("first", 9, 16.0, *size, start) for size in sizes for start in (0.0, 0.5625, 1.125)}
        | {("first", 1, None, *size, 1.0) for size in sizes}
        | {("short", 1, None, *size, 2.25) for size in sizes}
        | {("picture", 1, None, height, width, 1.0) for height, width in ((32, 32), (64, 48))}
    )
    for row in clips:
        assert read_clip(row).shape == (row.frames, row.height, row.width, 3)


def test_clips_show_the_right_frames(videos: Path) -> None:
    clips = read_clips(run(videos, "--fps", "8", "--short-sides", "48", "--crf", "0"))
    video = next(c for c in clips if c.frames == 9)
    source = read_frames(videos / "a.mp4")
    assert (read_clip(video).int() - source[0:18:2].int()).abs().float().mean() < 2
    image = next(c for c in clips if c.caption == "short")
    assert torch.equal(read_clip(image)[0], source[36])


def test_a_restart_cuts_only_what_is_missing(videos: Path) -> None:
    folder = run(videos)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    gone, kept = sorted(folder.glob("*.mp4"))[0], sorted(folder.glob("*.png"))[0]
    gone.unlink()
    kept.write_bytes(b"a finished file is not touched")
    run(videos)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after.pop(kept.name) == b"a finished file is not touched"
    assert after == {name: data for name, data in before.items() if name != kept.name}


def test_other_settings_never_reuse_a_clip(videos: Path) -> None:
    names = {path.name for path in run(videos).glob("*.mp4")}
    for change in (("--crf", "20"), ("--multiple", "4"), ("--fps", "16")):
        assert not names & {path.name for path in run(videos, *change, output=" ".join(change)).glob("*.mp4")}


def test_absent_videos_are_all_named(videos: Path) -> None:
    write_rows(videos, [*ROWS, {**ROWS[0], "video": "c.mp4"}, {**ROWS[0], "video": "d.mp4"}])
    with pytest.raises(DataError, match=r"2 of 4 videos are not in .*: c\.mp4, d\.mp4"):
        run(videos)
    assert not (videos.parent / "clips").exists(), "nothing is cut before all videos are there"
    assert len(read_clips(run(videos, "--skip-bad"))) == 4


def test_bad_videos_and_parts_are_skipped_and_counted(videos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    late = {"video": "a.mp4", "start": 3.0, "end": 9.0, "caption": "late"}
    (videos / "c.mp4").write_bytes((videos / "a.mp4").read_bytes()[:300])
    write_rows(videos, [*ROWS, {**ROWS[0], "video": "c.mp4"}, late])
    with pytest.raises(DataError, match=r"c\.mp4"):
        run(videos)
    skipped: clip.Counter[str] = clip.Counter()
    rules = clip.ClipRules((32,), (1, 9), (8.0,), 16, 6)
    captions = clip.read_captions(videos / "captions.jsonl")
    clips = clip.cut_all(captions, videos, videos.parent / "out", rules, True, skipped)
    assert [c.caption for c in clips] == ["first", "first", "short", "picture"]
    assert skipped == {
        "video that can't be decoded": 1,
        "caption of a missing or damaged video": 1,
        "caption of a part that can't be decoded": 1,
        "caption of a part too short for 9 frames at 8 fps": 1,
    }
    write_rows(videos, [late])
    with pytest.raises(DataError, match=r"caption at 9\.0 s of a\.mp4, which lasts 2\.500 s: late"):
        run(videos)


def test_videos_are_not_enlarged(videos: Path) -> None:
    with pytest.raises(DataError, match=r"no clip could be cut.*smaller than 128 pixels"):
        run(videos, "--short-sides", "128")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--frames", "16"), "--frames 16 is not 8k.1.*nearest: 17"),
        (("--frames", "0"), "nearest: 1"),
        (("--fps", "0"), "--fps 0.0 must lie in"),
        (("--short-sides", "8"), "--short-sides 8 must not be below --multiple 16"),
        (("--crf", "60"), "--crf 60"),
    ],
)
def test_options_out_of_range_are_refused(videos: Path, options: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(videos, *options)


def test_videos_of_one_name_in_many_folders_never_share_a_clip(tmp_path: Path) -> None:
    """Of these two the first 32 bits of the hash are equal, as of two of 80,000 in general."""
    paths = []
    for name in ("001575/video.mp4", "008171/video.mp4"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(bytes(1000))
        row, info = Caption(video=name, caption="x", image_at=0.0), VideoInfo(16, 16, 8.0, 1.0, 1.0)
        (cut,) = clip.plan_row(row, info, tmp_path, tmp_path, clip.ClipRules((16,), (1,), (8.0,), 16, 0), Counter())
        paths.append(cut.clip.path)
    assert paths[0] != paths[1]


def test_names_may_be_as_long_as_a_file_system_takes_and_hold_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stem = "視" * 83  # 249 bytes
    names = [f"{stem}.mp4", "talk: first part\n.mp4", "x" * 300 + ".mp4", "gone.mp4"]
    frames = shape_frames(0, 9, 32, 32)[0]
    for name in names[:2]:
        write_video(tmp_path / "written.mp4", frames, 8)
        (tmp_path / "written.mp4").rename(tmp_path / name)
    write_rows(tmp_path, [{"video": name, "image_at": 0.5, "caption": "x"} for name in names])
    monkeypatch.chdir(tmp_path)  # a relative path that begins with a word and a colon is no address
    parser = argparse.ArgumentParser()
    clip.add_arguments(parser)
    fixed = ["--captions", "captions.jsonl", "--output", "clips", "--short-sides", "32", "--skip-bad"]
    clip.run(parser.parse_args(fixed))
    assert [row.source for row in read_clips(tmp_path / "clips")] == names[:2]


def test_a_video_that_goes_while_it_is_looked_at_is_left_out(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = clip.probe

    def probing(path: Path) -> VideoInfo:
        info = plain(path)
        if path.name == "b.mp4":
            path.unlink()
        return info

    monkeypatch.setattr(clip, "probe", probing)
    assert {row.source for row in read_clips(run(videos, "--skip-bad"))} == {"a.mp4"}
