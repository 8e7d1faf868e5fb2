"""`encode --captions`: the clips that `megacogvx clips` would cut, without files between."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import pytest
import torch

from megacogvx.curation import clip, clip_encoder, encode, encode_shards
from megacogvx.curation.clip_source import listed
from megacogvx.data.clips import Clip, read_clip, read_clips
from megacogvx.data.images import write_png
from megacogvx.data.indexed import IndexedDataset
from megacogvx.data.transforms import to_model_range
from megacogvx.data.video import write_video
from megacogvx.errors import DataError
from megacogvx.models.vae.config import VAEConfig
from megacogvx.models.vae.initialize import initialize_weights
from megacogvx.models.vae.model import CogVideoXVAE
from megacogvx.testing.moving_shapes import shape_frames
from megacogvx.testing.tiny_text_encoder import build_tiny_text_encoder

ROWS = [
    {"video": "a.mp4", "start": 0.2, "end": 1.5, "caption": "a red circle moves to the left"},
    {"image": "b.png", "caption": "a picture of a blue square"},
]
RULES = ["--short-sides", "32", "--frames", "1", "9", "--fps", "8", "16"]


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """A video of 1.75 s at 16 frames per second, 48 x 80 pixels, a picture, their captions as CSV, a text encoder."""
    folder = tmp_path / "videos"
    write_video(folder / "a.mp4", shape_frames(0, 28, 48, 80)[0], 16, crf=0)
    write_png(folder / "b.png", shape_frames(1, 1, 40, 64)[0][0])
    write_rows(folder, ROWS)
    build_tiny_text_encoder(folder / "t5", [row["caption"] for row in ROWS], width=16, vocabulary=48)
    return folder


def write_rows(folder: Path, rows: list[dict[str, object]]) -> None:
    with (folder / "captions.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["video", "image", "start", "end", "caption"])
        table.writeheader()
        table.writerows(rows)


def row(each: Clip) -> dict[str, object]:
    return each.model_dump(include=set(Clip.model_fields))


def arguments(videos: Path, *options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    encode.add_arguments(parser)
    fixed = ["--captions", str(videos / "captions.csv"), "--vae", "vae", "--text-encoder", str(videos / "t5")]
    fixed += ["--output", str(videos.parent / "dataset"), "--text-length", "48", "--device", "cpu"]
    return parser.parse_args([*fixed, *RULES, *options])


@pytest.fixture
def vae(monkeypatch: pytest.MonkeyPatch) -> CogVideoXVAE:
    config = VAEConfig(block_out_channels=(4, 4, 4, 4), norm_num_groups=2, layers_per_block=1, latent_channels=4)
    model = CogVideoXVAE(config).requires_grad_(False)
    initialize_weights(model, seed=0)
    monkeypatch.setattr(encode_shards, "load_vae", lambda path, device, dtype: model)
    return model


def test_the_pixels_are_those_of_the_clips_that_would_be_cut(videos: Path) -> None:
    parser = argparse.ArgumentParser()
    clip.add_arguments(parser)
    output = videos.parent / "dataset"
    clip.run(parser.parse_args(
        ["--captions", str(videos / "captions.csv"), "--output", str(output), "--crf", "0", *RULES]
    ))  # fmt: skip
    written = read_clips(output)
    clips, read = listed(arguments(videos))
    assert [row(each) for each in clips] == [row(each) for each in written]
    assert len(clips) == 5  # a frame of the part, 9 at 8 a second, twice 9 at 16; the picture
    assert {(each.frames, each.fps) for each in clips} == {(9, 8.0), (9, 16.0), (1, None)}
    for each in clips:
        pixels, kept = read(each), read_clip(each)
        assert pixels.shape == kept.shape and pixels.dtype == torch.uint8
        assert (pixels.float() - kept.float()).abs().mean() < 0.7  # x264 without loss rounds RGB to YUV
        assert torch.equal(read(each, count=1), pixels[:1])


def test_a_list_becomes_a_dataset_without_files_between(
    videos: Path, vae: CogVideoXVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = arguments(videos, "--clips-per-shard", "3", "--first-frame")
    encode.run(asked)
    dataset, (clips, read) = IndexedDataset(asked.output), listed(asked)
    assert not [path for path in asked.output.iterdir() if path.suffix in (".mp4", ".png")]
    assert len(dataset) == len(clips) == 5 and len(dataset.shards) == 2
    for number, each in enumerate(clips):
        record = dataset.sample(number, first_frame=True)
        expected = vae.encode(to_model_range(read(each))[None])[0].permute(1, 2, 3, 0)
        assert torch.equal(record.latents, expected.to(torch.bfloat16))
        assert torch.equal(record.first_frame, read(each)[0])
        assert (record.metadata["caption"], record.metadata["source"]) == (each.caption, each.source)
    (asked.output / "shard-00000.idx").unlink()
    encoded = []
    moments = clip_encoder.ClipEncoder.moments
    monkeypatch.setattr(clip_encoder.ClipEncoder, "moments", lambda self, c: encoded.append(c) or moments(self, c))
    encode.run(asked)
    assert encoded == clips[:3], "a restart encodes what is missing"
    with (videos / "a.mp4").open("ab") as file:
        file.write(b"another version")
    with pytest.raises(DataError, match=r"a\.mp4 has \d+ bytes, it had \d+ when its clips were planned"):
        read(clips[0])
    (videos / "a.mp4").unlink()
    with pytest.raises(DataError, match=r"a\.mp4 can't be read: No such file"):
        read(clips[0])


def test_bad_rows_stop_the_job_or_are_counted(
    videos: Path, vae: CogVideoXVAE, caplog: pytest.LogCaptureFixture
) -> None:
    late = {"video": "a.mp4", "start": 5.0, "end": 6.0, "caption": "beyond the end"}
    write_rows(videos, [*ROWS, late, {"image": "absent.png", "caption": "nothing"}])
    with pytest.raises(DataError, match=r"1 of 3 videos are not in .*: absent\.png"):
        encode.run(arguments(videos))
    encode.run(arguments(videos, "--skip-bad"))
    assert len(IndexedDataset(videos.parent / "dataset")) == 5
    for reason in ("video that is missing", "caption of a missing or damaged video", clip.UNDECODABLE):
        assert f"left out: 1 x {reason}" in caplog.text
