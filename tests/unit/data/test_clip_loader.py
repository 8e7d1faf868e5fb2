import itertools
import json
from pathlib import Path

import pytest
import torch

from megacogvx.data.clip_loader import ClipLoader, ClipsConfig, split_held_out
from megacogvx.data.clips import Clip, read_clip, read_clips, write_clips
from megacogvx.data.video import write_video
from megacogvx.errors import ConfigError, DataError
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


def test_batches_have_equal_shapes_and_range(folder: Path) -> None:
    for batch in itertools.islice(ClipLoader(config(folder), seed=1), 10):
        frames = 1 if batch.step % 5 == 4 else FRAMES  # every fifth step is one of images
        assert batch.video_BCTHW.shape == (4, 3, frames, 16, 24)
        assert batch.video_BCTHW.dtype == torch.float32
        assert -1 <= batch.video_BCTHW.min() < 0 < batch.video_BCTHW.max() <= 1


def test_steps_do_not_depend_on_the_start_or_the_prefetching(folder: Path) -> None:
    whole = list(itertools.islice(ClipLoader(config(folder), seed=1), 8))
    resumed = list(itertools.islice(ClipLoader(config(folder, prefetch=0), seed=1, start_step=3), 5))
    assert [batch.step for batch in resumed] == [3, 4, 5, 6, 7]
    for expected, got in zip(whole[3:], resumed, strict=True):
        assert torch.equal(expected.video_BCTHW, got.video_BCTHW)


def test_data_ranks_share_the_batch_of_one(folder: Path) -> None:
    alone = ClipLoader(config(folder), seed=1)
    shared = [ClipLoader(config(folder), seed=1, data_rank=rank, data_size=2) for rank in range(2)]
    for step in range(6):
        parts = [loader.batch(step).video_BCTHW for loader in shared]
        assert torch.equal(alone.batch(step).video_BCTHW, torch.stack(parts, dim=1).flatten(0, 1))


def test_an_epoch_sees_each_clip_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = ClipLoader(config(folder, held_out_fraction=0, clips_per_step=3), seed=1)
    seen: list[Path] = []

    def record(clip: Clip, first: int, count: int, stride: int) -> torch.Tensor:
        seen.append(clip.path)
        return read_clip(clip, first, count, stride)

    monkeypatch.setattr("megacogvx.data.clip_loader.read_clip", record)
    videos, images = ([clip.path for clip in clips] for clips in (loader.videos, loader.images))
    orders = []
    for steps in ((0, 1, 2), (3, 5, 6)):  # an epoch is 9 videos; step 4 is the first of images
        seen.clear()
        for step in steps:
            loader.batch(step)
        assert len(seen) == 9 and set(seen) == set(videos)
        orders.append(tuple(seen))
    assert len({*orders, tuple(videos)}) == 3, "shuffled, and anew in each epoch"
    seen.clear()
    loader.batch(4)
    assert len(seen) == 3 and set(seen) == set(images)


def test_another_seed_gives_other_crops(tmp_path: Path) -> None:
    write_clips(tmp_path / "clips.jsonl", [make_clip(tmp_path, 0)])
    single = config(tmp_path, held_out_fraction=0, clips_per_step=1, height=24, width=32)
    first, second = (ClipLoader(single, seed=seed).batch(0).video_BCTHW for seed in (1, 2))
    assert not torch.equal(first, second)


def numbered(folder: Path, frames: int, fps: float) -> Clip:
    """Write a clip whose frames are grey in the shade of their number, times ten."""
    shades = torch.arange(frames, dtype=torch.uint8)[:, None, None, None] * 10
    path = folder / f"{frames}-{fps:g}.mp4"
    write_video(path, shades.expand(-1, 16, 24, 3), fps, crf=0)
    return Clip(path=path, caption="a", frames=frames, height=16, width=24, fps=fps, source=path.name, start=0.0)


def shades(video_CTHW: torch.Tensor) -> list[int]:
    return [round(float(frame.mean() + 1) * 12.75) for frame in video_CTHW.unbind(1)]


def test_rates_are_drawn_for_each_clip_from_those_it_is_good_for(tmp_path: Path) -> None:
    write_clips(
        tmp_path / "clips.jsonl", [numbered(tmp_path, 9, 16), numbered(tmp_path, 5, 16), numbered(tmp_path, 7, 12)]
    )
    loader = ClipLoader(config(tmp_path, frames=5, fps=[8, 16], image_share=0, held_out_fraction=0), seed=1)
    assert len(loader.videos) == 2, "12 fps is a multiple of neither"
    both = ClipLoader(config(tmp_path, frames=5, fps=[8, 12], image_share=0, held_out_fraction=0), seed=1)
    assert {clip.frames for clip in both.videos} == {9, 7}, "five frames at 16 fps are too short for five at 8"
    strides = []
    for step in range(16):
        for video in loader.batch(step).video_BCTHW:
            seen = shades(video)
            strides.append(seen[1] - seen[0])
            assert seen == list(range(seen[0], seen[0] + 5 * strides[-1], strides[-1]))
    # Half of the items are of the longer clip, and half of those at 8 fps.
    assert 6 <= strides.count(2) <= 26 and strides.count(1) + strides.count(2) == 64


def test_held_out_videos_are_seen_at_the_first_rate(tmp_path: Path) -> None:
    write_clips(tmp_path / "clips.jsonl", [numbered(tmp_path, 9, 16), numbered(tmp_path, 10, 16)])
    loader = ClipLoader(config(tmp_path, frames=5, fps=[8, 16], held_out_fraction=0.01), seed=1)
    assert [shades(video[0]) for _, video in loader.held_out_videos()] == [[0, 2, 4, 6, 8]]


def test_held_out_videos_may_be_larger_than_those_of_training(folder: Path) -> None:
    larger = config(folder, held_out_fraction=0.3, held_out_height=32, held_out_width=40)
    videos = list(ClipLoader(larger, seed=1).held_out_videos())
    assert videos and all(video.shape[3:] == (32, 40) for _, video in videos)
    beyond = config(folder, held_out_fraction=0.3, held_out_height=33)
    assert not list(ClipLoader(beyond, seed=1).held_out_videos())


def test_a_rate_that_no_clip_is_good_for_is_named(tmp_path: Path) -> None:
    write_clips(tmp_path / "clips.jsonl", [numbered(tmp_path, 5, 12)])
    with pytest.raises(DataError, match=r"clips\.fps=\(8\.0, 16\.0\), .*\(5, 16, 24, 12\.0\)"):
        ClipLoader(config(tmp_path, frames=5, fps=[8, 16]), seed=1)


def test_images_are_taken_from_videos_where_there_are_none(folder: Path, tmp_path: Path) -> None:
    clips = [clip for clip in read_clips(folder) if not clip.is_image]
    write_clips(folder / "videos.jsonl", clips)
    loader = ClipLoader(config(folder, paths=[str(folder / "videos.jsonl")], image_share=1), seed=1)
    assert loader.batch(0).video_BCTHW.shape == (4, 3, 1, 16, 24)


def test_held_out_clips_are_never_trained_on(folder: Path) -> None:
    loader = ClipLoader(config(folder, held_out_fraction=0.3), seed=1)
    trained = {clip.path for clip in loader.videos + loader.images}
    held_out = {clip.path for clip in loader.held_out}
    assert held_out and not held_out & trained and len(held_out | trained) == 12
    assert held_out == {clip.path for clip in ClipLoader(config(folder, held_out_fraction=0.3), seed=2).held_out}
    for clip, video in loader.held_out_videos():
        assert video.shape == (1, 3, min(clip.frames, FRAMES), 16, 24)


def test_parts_and_sizes_of_a_scene_stay_together() -> None:
    def row(source: int, start: float, frames: int, caption: str) -> Clip:
        path = Path(f"{source}-{start}-{frames}.mp4")
        return Clip(
            path=path, caption=caption, frames=frames, height=8, width=8, fps=8, source=str(source), start=start
        )

    scenes = [
        [row(n, 0, 17, "a"), row(n, 0, 9, "a"), row(n, 9 / 8, 9, "a"), row(n, 2.0, 9, "overlaps")] for n in range(40)
    ]
    for fraction in (1e-9, 0.5):
        held_out = split_held_out([clip for scene in scenes for clip in scene], fraction)[1]
        for scene in scenes:
            assert len({clip in held_out for clip in scene}) == 1
        count = len(held_out) // 4
        assert count == 1 if fraction < 0.1 else 10 <= count <= 30, "at least one scene, else about the fraction"
    later = row(0, 10.0, 9, "another scene")
    assert split_held_out([*scenes[0], later], 1e-9)[1] in ([later], scenes[0])
    assert split_held_out(scenes[0], 0) == (scenes[0], [])
    more = [clip for scene in scenes for clip in scene]
    fewer = [clip for scene in scenes[:20] for clip in scene]
    assert set(split_held_out(fewer, 0.5)[1]) == set(split_held_out(more, 0.5)[1]) & set(fewer), "growing moves none"


def test_settings_that_cannot_work_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="clips_per_step=4 does not divide by the 3 data ranks"):
        ClipLoader(config(folder), seed=0, data_size=3)
    with pytest.raises(ConfigError, match=r"clips\.paths is empty"):
        ClipLoader(ClipsConfig(), seed=0)
    with pytest.raises(DataError, match=r"clips.height=999.*\(9, 32, 48, 8.0\)"):
        ClipLoader(config(folder, height=999), seed=0)
    with pytest.raises(DataError, match=r"clips.frames=99"):
        ClipLoader(config(folder, frames=99), seed=0)


def test_a_broken_clip_reaches_the_consumer(folder: Path, tmp_path: Path) -> None:
    clip = make_clip(tmp_path, 0)
    write_clips(tmp_path / "clips.jsonl", [clip])
    clip.path.write_bytes(clip.path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"0\.mp4"):
        next(iter(ClipLoader(config(tmp_path, held_out_fraction=0), seed=0)))


def test_a_run_goes_on_with_the_same_clips_alone(folder: Path) -> None:
    kept = json.loads(json.dumps(ClipLoader(config(folder), seed=1).state()))
    ClipLoader(config(folder), seed=1, data_rank=1, data_size=2).check_state(kept)
    ClipLoader(config(folder), seed=1).check_state({})  # of a version that kept nothing
    write_clips(folder / "fewer.jsonl", read_clips(folder)[1:])
    renamed = read_clips(folder)
    renamed[1].path.with_name("other.mp4").write_bytes(renamed[1].path.read_bytes())
    renamed[1] = renamed[1].model_copy(update={"path": renamed[1].path.with_name("other.mp4")})
    write_clips(folder / "renamed.jsonl", renamed)
    others = {
        "seed=1, this start has 2": ClipLoader(config(folder), seed=2),
        "clips=": ClipLoader(config(folder, paths=[str(folder / "fewer.jsonl")]), seed=1),
        "clips=\\w+": ClipLoader(config(folder, paths=[str(folder / "renamed.jsonl")]), seed=1),
        "clips_per_step=": ClipLoader(config(folder, clips_per_step=8), seed=1),
        "image_share=": ClipLoader(config(folder, image_share=0.5), seed=1),
    }
    for message, loader in others.items():
        with pytest.raises(DataError, match=rf"the run was at {message}.*start_from"):
            loader.check_state(kept)
