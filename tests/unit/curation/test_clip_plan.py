"""Processes that look into the videos of a list together."""

from __future__ import annotations

import json
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from megacogvx.curation import clip as clip_module
from megacogvx.curation import clip_plan
from megacogvx.curation.clip import ClipRules
from megacogvx.curation.clip_list import ClipList
from megacogvx.curation.clip_plan import ClipPlan, plan_clips
from megacogvx.data.images import write_png
from megacogvx.data.indexed.durable import try_lock
from megacogvx.data.video import VideoInfo
from megacogvx.errors import DataError
from megacogvx.testing.moving_shapes import shape_frames

RULES = ClipRules(short_sides=(16, 32), frames=(1,), fps=(8.0,), multiple=16, crf=0)
PICTURES = 7


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClipPlan:
    """Seven pictures, every third too small for the larger size, in parts of two rows."""
    monkeypatch.setattr(clip_plan, "PART", 2)
    monkeypatch.setattr(clip_plan, "POLL_SECONDS", 0.01)
    for number in range(PICTURES):
        side = 24 if number % 3 == 1 else 40
        write_png(tmp_path / "videos" / f"{number}.png", shape_frames(0, 1, side, side)[0][0])
    rows = [{"image": f"{number}.png", "caption": f"picture {number}"} for number in range(PICTURES)]
    return plan_of(tmp_path, rows)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each video is opened."""
    seen: Counter[str] = Counter()
    plain = clip_module.probe

    def counting(path: Path) -> VideoInfo:
        seen[path.name] += 1
        return plain(path)

    monkeypatch.setattr(clip_module, "probe", counting)
    return seen


def plan_of(folder: Path, rows: list[dict[str, str]], skip_bad: bool = False, rules: ClipRules = RULES) -> ClipPlan:
    captions = folder / "captions.jsonl"
    captions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ClipPlan(captions, folder / "videos", folder / "dataset", rules, skip_bad)


def names(clips: ClipList) -> list[str]:
    return [each.path.name for each in clips]


def test_each_video_is_opened_by_one_process(
    plan: ClipPlan, opened: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda rank: plan_clips(plan, rank, 3), range(3)))
    assert opened == {f"{number}.png": 1 for number in range(PICTURES)}
    assert len(found[0]) == 2 * PICTURES - 2 and len({each.path for each in found[0]}) == len(found[0])
    assert names(found[0]) == names(found[1]) == names(found[2])
    assert names(plan_clips(plan, 0, 1)) == names(found[0])
    assert sum(opened.values()) == PICTURES, "a restart opens none"
    monkeypatch.setattr(clip_plan, "PART", 4096)
    other = ClipPlan(plan.captions, plan.videos, plan.output / "whole", plan.rules, plan.skip_bad)
    assert names(plan_clips(other, 0, 1)) == names(found[0]), "parts decide nothing"
    assert found[0].checksum() == plan_clips(other, 0, 1).checksum()


def test_a_process_waits_for_what_another_is_at_work_on_and_takes_what_one_left(
    plan: ClipPlan, opened: Counter[str], caplog: pytest.LogCaptureFixture
) -> None:
    plan.folder.mkdir(parents=True)
    (plan.folder / "000001.lock").touch()  # of a process that was killed
    with (plan.folder / "000002.lock").open("ab") as file, ThreadPoolExecutor(1) as threads:
        assert try_lock(file)
        found: Future[ClipList] = threads.submit(plan_clips, plan, 0, 2)
        try:
            while "waiting for 1 of 4 parts of the plan" not in caplog.text and not found.done():
                time.sleep(0.01)
            assert not found.done()
            assert set(opened) == {"0.png", "1.png", "2.png", "3.png", "6.png"}
        finally:
            file.close()  # the other ends without having done it
        assert len(found.result(timeout=60)) == 2 * PICTURES - 2
    assert all(count == 1 for count in opened.values())
    assert not list(plan.folder.glob("*.lock"))


def test_another_list_or_other_rules_are_planned_anew(plan: ClipPlan, tmp_path: Path, opened: Counter[str]) -> None:
    plan_clips(plan, 0, 1)
    small = ClipRules((16,), (1,), (8.0,), 16, 0)
    rows = [{"image": f"{number}.png", "caption": f"picture {number}"} for number in range(3)]
    folders = {plan.folder}
    for other, count in ((plan_of(tmp_path, rows), 5), (plan_of(tmp_path, rows, rules=small), 3)):
        assert len(plan_clips(other, 0, 1)) == count
        folders.add(other.folder)
    assert len(folders) == 3 and sum(opened.values()) == PICTURES + 3 + 3


def test_what_is_left_out_is_counted_over_all_parts(
    plan: ClipPlan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"image": f"{number}.png", "caption": "one of ten"} for number in range(10)]
    with pytest.raises(DataError, match=r"1 of 2 videos are not in .*: 7\.png"):
        plan_clips(plan_of(tmp_path, rows), 0, 1)
    caplog.clear()
    assert len(plan_clips(plan_of(tmp_path, rows, skip_bad=True), 0, 1)) == 2 * PICTURES - 2
    assert "left out: 3 x video that is missing" in caplog.text
    with pytest.raises(DataError, match=r"line 4: caption: String should have at least 1 character"):
        plan_clips(plan_of(tmp_path, [*rows[:3], {"image": "3.png", "caption": ""}]), 0, 1)
    with pytest.raises(DataError, match="no clip comes of 2 captions"):
        plan_clips(plan_of(tmp_path, rows[8:], skip_bad=True), 0, 1)
    with pytest.raises(DataError, match="holds no row"):
        plan_clips(plan_of(tmp_path, []), 0, 1)


def test_a_damaged_part_is_named(plan: ClipPlan) -> None:
    plan_clips(plan, 0, 1)
    (plan.folder / "000001.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"000001\.safetensors can't be read .* remove .*clip-plan-"):
        plan_clips(plan, 0, 1)
    plan.captions.unlink()
    with pytest.raises(DataError, match="No such file"):
        plan_clips(plan, 0, 1)
