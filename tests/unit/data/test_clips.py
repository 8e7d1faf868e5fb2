from pathlib import Path

import pytest

from megacogvx.data.clip_loader import ClipsConfig
from megacogvx.data.clips import Clip, read_clip, read_clips, write_clips
from megacogvx.errors import DataError
from megacogvx.testing.moving_shapes import write_shape_clip

HEIGHT, WIDTH, FRAMES = 32, 48, 9
Fields = dict[str, object]


def make_clip(folder: Path, number: int, frames: int = FRAMES, **changes: object) -> Clip:
    """Write clip `number`: a video, or an image when `frames` is 1; every one of another scene."""
    return write_shape_clip(folder, number, frames, HEIGHT, WIDTH, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight videos of 9 frames, one of 13, and three images."""
    path = tmp_path_factory.mktemp("clips")
    clips = [make_clip(path, number) for number in range(8)] + [make_clip(path, 8, frames=13)]
    write_clips(path / "clips.jsonl", clips + [make_clip(path, number, frames=1) for number in range(9, 12)])
    return path


def config(folder: Path, **changes: object) -> ClipsConfig:
    values = {"paths": [str(folder)], "frames": FRAMES, "height": 16, "width": 24, "clips_per_step": 4, "prefetch": 1}
    return ClipsConfig.model_validate({**values, **changes})


def test_the_list_comes_back(folder: Path) -> None:
    clips = read_clips(folder)
    assert len(clips) == 12 and clips[0].path == folder / "0.mp4"
    assert clips == read_clips(folder / "clips.jsonl")
    assert [clip.is_image for clip in clips] == [False] * 9 + [True] * 3
    assert clips[0].seconds == 9 / 8 and clips[-1].seconds == 0


def test_bad_lists_are_data_errors_that_name_the_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"clips\.jsonl does not exist"):
        read_clips(tmp_path)
    good = (folder / "clips.jsonl").read_text().splitlines()[0]
    for bad, message in (
        (good.replace("0.mp4", "../0.mp4"), "leads out of the folder"),
        (good.replace("0.mp4", "/0.mp4"), "leads out of the folder"),
        (good.replace('"frames": 9', '"frames": 0'), "frames: Input should be greater"),
        (good.replace('"frames"', '"frame"'), "frame"),
        ("[1]", "line 2"),
        ("{", "line 2"),
        ("\xff\xfe", "line 2"),
    ):
        (tmp_path / "clips.jsonl").write_bytes(f"{good}\n{bad}\n".encode("latin-1"))
        with pytest.raises(DataError, match=rf"line 2.*{message}|{message}"):
            read_clips(tmp_path)


def test_a_clip_that_differs_from_its_row_is_a_data_error(folder: Path) -> None:
    clip = read_clips(folder)[0]
    with pytest.raises(DataError, match=r"\(9, 32, 48\), its row says \(9, 32, 64\)"):
        read_clip(clip.model_copy(update={"width": 64}))
    with pytest.raises(DataError, match="has 9 frames"):
        read_clip(clip.model_copy(update={"frames": 17}))
