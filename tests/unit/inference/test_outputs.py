import json

import av
import pytest
import torch

from megacogvx import draws
from megacogvx.errors import ConfigError
from megacogvx.inference.outputs import Outputs

FACTS = {"prompt": "a dog", "text": "a dog", "seed": 3, "fps": 8.0, "image": None, "layout": "tp1", "scale": 0.7}
FRAMES = torch.full((9, 32, 48, 3), 90, dtype=torch.uint8)
NAME = "sample-000"


def test_a_finished_video_is_not_made_again(tmp_path):
    outputs = Outputs(tmp_path)
    assert not outputs.is_finished(NAME, FACTS)
    outputs.write(NAME, FRAMES, {**FACTS, "seconds": 3.0})
    assert outputs.is_finished(NAME, {**FACTS, "text": "a dog, written out", "layout": "tp2"})
    assert json.loads((tmp_path / "sample-000.json").read_text()) == {**FACTS, "seconds": 3.0}


def test_a_video_without_its_settings_or_files_is_unfinished(tmp_path):
    outputs = Outputs(tmp_path, png=True, sheet=True)
    for missing in ("sample-000.json", "sample-000.mp4", "sample-000-sheet.png", "sample-000/frame-0000.png"):
        outputs.write(NAME, FRAMES, FACTS)
        assert outputs.is_finished(NAME, FACTS)
        (tmp_path / missing).unlink()
        assert not outputs.is_finished(NAME, FACTS), missing
    Outputs(tmp_path).write(NAME, FRAMES, FACTS)
    (tmp_path / "sample-000.json").write_text('{"prompt": ')
    assert not Outputs(tmp_path, overwrite=True).is_finished(NAME, FACTS)


def test_other_settings_are_not_overwritten_unasked(tmp_path):
    Outputs(tmp_path).write(NAME, FRAMES, FACTS)
    now = {**FACTS, "seed": 4}
    with pytest.raises(ConfigError, match=r"sample-000.json was made with seed=3 \(now 4\); choose another --output"):
        Outputs(tmp_path).is_finished(NAME, now)
    assert not Outputs(tmp_path, overwrite=True).is_finished(NAME, now)
    assert Outputs(tmp_path, overwrite=True).is_finished(NAME, FACTS), "what is as asked for stays"


def test_settings_are_written_last(tmp_path, monkeypatch):
    """A video that was interrupted while its pictures were written is made again."""
    outputs = Outputs(tmp_path, sheet=True)
    monkeypatch.setattr("megacogvx.inference.outputs.write_png", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        outputs.write(NAME, FRAMES, FACTS)
    assert (tmp_path / "sample-000.mp4").exists()
    assert not outputs.is_finished(NAME, FACTS)


def test_an_interrupted_overwrite_vouches_for_no_other_video(tmp_path, monkeypatch):
    Outputs(tmp_path).write(NAME, FRAMES, FACTS)
    monkeypatch.setattr("megacogvx.inference.outputs.write_png", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        Outputs(tmp_path, sheet=True, overwrite=True).write(NAME, FRAMES, {**FACTS, "seed": 4})
    assert not Outputs(tmp_path).is_finished(NAME, FACTS), "the video is the new one"


def test_a_shorter_video_leaves_no_frames_of_the_longer_one(tmp_path):
    outputs = Outputs(tmp_path, png=True)
    outputs.write(NAME, FRAMES, FACTS)
    outputs.write(NAME, FRAMES[:5], FACTS)
    assert len(list((tmp_path / NAME).glob("frame-*.png"))) == 5


def test_what_is_asked_for_is_written(tmp_path):
    Outputs(tmp_path, png=True, sheet=True).write(NAME, FRAMES, FACTS)
    with av.open(str(tmp_path / "sample-000.mp4")) as container:
        assert len(list(container.decode(video=0))) == 9
    assert len(list((tmp_path / NAME).glob("frame-*.png"))) == 9
    with av.open(str(tmp_path / "sample-000-sheet.png")) as picture:
        stream = picture.streams.video[0]
        assert (stream.height, stream.width) == (2 * 32 + 2, 4 * 48 + 3 * 2)


def test_latents_are_kept_until_they_are_decoded(tmp_path):
    outputs, latents = Outputs(tmp_path), draws.normal((3, 4, 4, 6), 0, "latents")
    assert outputs.kept_facts(NAME, FACTS) is None
    outputs.keep_latents(NAME, latents, {**FACTS, "text": "written out"})
    kept = outputs.kept_facts(NAME, FACTS)
    assert kept is not None and kept["text"] == "written out"
    assert torch.equal(outputs.kept_latents(NAME), latents)
    assert outputs.kept_facts(NAME, {**FACTS, "seed": 4}) is None, "of other settings"
    outputs.write(NAME, FRAMES, FACTS)
    assert outputs.kept_facts(NAME, FACTS) is None
    outputs.clear()
    assert not (tmp_path / ".latents").exists()


def test_damaged_latents_are_sampled_again(tmp_path):
    outputs = Outputs(tmp_path)
    outputs.keep_latents(NAME, draws.normal((3, 4, 4, 6), 0, "latents"), FACTS)
    (file,) = (tmp_path / ".latents").iterdir()
    file.write_bytes(file.read_bytes()[:-40])
    assert outputs.kept_facts(NAME, FACTS) is None
    outputs.clear()
    assert file.exists(), "a folder that isn't empty stays"
