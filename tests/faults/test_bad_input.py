"""What a user gets wrong, through the command line: status 2, one message that names it and a way out, nothing lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from megacogvx.cli import USER_ERROR_STATUS, main
from megacogvx.data.video import write_video
from megacogvx.testing.moving_shapes import shape_frames
from megacogvx.testing.tiny_dataset import write_tiny_dataset

CONFIG = {
    "model": {"preset": "tiny"},
    "data": {"tokens_per_pack": 1024, "packs_per_step": 2},
    "training": {"steps": 1},
}


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]):
    """Run a verb that must be refused; return its message."""

    def run(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == USER_ERROR_STATUS
        message = capfd.readouterr().err
        assert "Traceback" not in message
        return message

    return run


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Two captioned videos."""
    folder = tmp_path / "videos"
    folder.mkdir()
    rows = []
    for number in range(2):
        frames, caption = shape_frames(number, 24, 48, 64)
        write_video(folder / f"{number}.mp4", frames, 8)
        rows.append({"video": f"{number}.mp4", "start": 0, "end": 3, "caption": caption})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def clips(videos: Path, output: Path, *more: object) -> tuple[object, ...]:
    return ("clips", "--captions", videos / "captions.jsonl", "--output", output, "--short-sides", 32, *more)


def config_file(folder: Path, **sections: dict) -> Path:
    values = {name: {**CONFIG.get(name, {}), **sections.get(name, {})} for name in {*CONFIG, *sections}}
    values["data"].setdefault("paths", [str(folder / "dataset")])
    values["training"].setdefault("run_folder", str(folder / "run"))
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_caption_file_that_names_an_absent_video(videos, tmp_path, refused):
    (videos / "1.mp4").unlink()
    message = refused(*clips(videos, tmp_path / "clips"))
    assert "1.mp4" in message and not (tmp_path / "clips" / "clips.jsonl").exists()


def test_truncated_video_is_refused_or_counted(videos, tmp_path, refused, capfd):
    data = (videos / "1.mp4").read_bytes()
    (videos / "1.mp4").write_bytes(data[: len(data) // 3])
    assert "1.mp4" in refused(*clips(videos, tmp_path / "clips"))
    assert main([str(a) for a in clips(videos, tmp_path / "clips", "--skip-bad")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "clips" / "clips.jsonl").read_text().splitlines()]
    assert rows and {row["source"] for row in rows} == {"0.mp4"}


def test_unknown_config_key_suggests_the_nearest(tmp_path, refused):
    path = config_file(tmp_path, parallel={"tensor_parallel": 2})
    assert "did you mean parallel.tensor_parallel_size?" in refused("train", "--config", path)


def test_sizes_that_do_not_divide_name_those_that_work(tmp_path, refused):
    path = config_file(tmp_path)
    message = refused("train", "--config", path, "model.attention_head_dim=20")
    assert "attention_head_dim=20" in message and "multiple of 16" in message


def test_too_few_processes(tmp_path, refused):
    message = refused("train", "--config", config_file(tmp_path), "parallel.tensor_parallel_size=2")
    assert "1 started; start at least 2" in message


def test_missing_dataset_is_named_before_any_process_group(tmp_path, refused):
    assert str(tmp_path / "dataset") in refused("train", "--config", config_file(tmp_path))


def test_dataset_of_another_width_names_the_key(tmp_path, refused):
    write_tiny_dataset(tmp_path / "dataset")
    message = refused("train", "--config", config_file(tmp_path))
    assert "model.out_channels=16" in message or "model.text_embed_dim=64" in message
    assert "set model." in message


def test_half_written_checkpoint_is_skipped_and_named(tmp_path, refused):
    partial = tmp_path / "run" / "checkpoints" / "step-00000010"
    partial.mkdir(parents=True)
    (partial / "state.json").write_text("{}")
    sampling = ("--vae", tmp_path / "vae", "--text-encoder", tmp_path / "text", "--prompt", "a cat")
    message = refused("generate", "--checkpoint", tmp_path / "run", *sampling)
    assert "step-00000010" in message and "no complete checkpoint" in message
    assert partial.exists()  # what is there is left alone


def test_damaged_dataset_names_the_shard(tmp_path, refused):
    write_tiny_dataset(tmp_path / "dataset")
    index = next((tmp_path / "dataset").glob("*.idx"))
    data = bytearray(index.read_bytes())
    data[len(data) // 2] ^= 1
    index.write_bytes(bytes(data))
    assert index.stem in refused("data", "info", tmp_path / "dataset")


def test_interrupted_clips_go_on_where_they_were(videos, tmp_path):
    arguments = [str(argument) for argument in clips(videos, tmp_path / "clips")]
    assert main(arguments) == 0
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "clips").glob("*.mp4")}
    shutil.rmtree(tmp_path / "again", ignore_errors=True)
    removed = sorted(written)[0]
    removed.unlink()
    assert main(arguments) == 0
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "clips").glob("*.mp4")}
    assert after.keys() == written.keys() and {p for p in after if after[p] != written[p]} == {removed}
