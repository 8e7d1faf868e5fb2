"""`megacogvx evaluate`: any checkpoint, any folder, and the numbers that the metrics give."""

import csv
import json
import math
from dataclasses import replace

import pytest
import torch

from megacogvx import draws
from megacogvx.cli import main
from megacogvx.conversion.convert import convert
from megacogvx.conversion.settings import VAESettings
from megacogvx.data import video
from megacogvx.data.clips import Clip
from megacogvx.data.images import read_image, write_png
from megacogvx.data.transforms import to_model_range
from megacogvx.data.video import read_frames, write_video
from megacogvx.errors import ConfigError, DataError
from megacogvx.evaluation.evaluate import Evaluator, find_files, perceptual_config, read_pixels
from megacogvx.evaluation.reconstruction import flickering, psnr, ssim
from megacogvx.evaluation.scores import averages
from megacogvx.inference.load import load_vae
from megacogvx.models.vae import CHUNKED, VAEConfig, VAELoss, VAELossConfig
from megacogvx.testing.drawn_checkpoint import drawn_part

SMALL = VAEConfig(
    block_out_channels=(4, 4, 8), layers_per_block=1, norm_num_groups=2, latent_channels=2, scaling_factor=1.0
)
RANDOM_NET = VAELossConfig(perceptual="random_net")


def pixels(frames, height=16, width=20, seed=0):
    noise = draws.normal((frames, height, width, 3), seed, "pixels").cumsum(0)
    return (128 + 30 * noise).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    part = drawn_part(VAESettings(SMALL))
    return {to: convert({"vae": part}, to, folder / to) for to in ("megacogvx", "diffusers")}


@pytest.fixture(scope="module")
def vae(checkpoints):
    return load_vae(checkpoints["diffusers"], torch.device("cpu"), torch.float32)


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    write_video(folder / "b.mp4", pixels(9), fps=8)
    write_video(folder / "c.MP4", pixels(4, seed=1), fps=8)
    write_png(folder / "a.png", pixels(1, seed=2)[0])
    (folder / "notes.txt").write_text("no video")
    return folder


def test_every_format_of_a_checkpoint_gives_one_table(checkpoints, videos, tmp_path, capsys):
    ours, theirs = checkpoints["megacogvx"], checkpoints["diffusers"]
    step = next((ours / "vae" / "checkpoints").glob("step-*"))
    found = []
    for number, path in enumerate((ours / "vae", step, theirs, theirs / "vae")):
        out = tmp_path / str(number)
        assert main(["evaluate", "--vae", str(path), "--videos", str(videos), "--pad", "--output", str(out)]) == 0
        found.append(json.loads((out / "reconstruction.json").read_text()))
        assert found[-1].pop("vae") == str(path)
    assert all(each == found[0] for each in found)
    assert [row["file"] for row in found[0]["files"]] == ["a.png", "b.mp4", "c.MP4"]
    assert found[0]["perceptual"] == "perceptual_random_net"
    assert "lpips" not in json.dumps(found).lower()
    with open(tmp_path / "0" / "reconstruction.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["psnr"]) for row in rows] == [row["psnr"] for row in (*found[0]["files"], found[0]["mean"])]
    assert f"{found[0]['mean']['ssim']:.4f}" in capsys.readouterr().out


def test_scores_are_the_metrics_of_the_reconstruction(vae):
    loss = VAELoss(RANDOM_NET)
    frames = pixels(9)
    scores = Evaluator(vae, loss, CHUNKED).measure("x", frames)
    source = to_model_range(frames)[None]
    result = vae.decode(vae.encode(source, CHUNKED)[:, :2], CHUNKED)
    assert result.shape == source.shape
    assert scores.psnr == pytest.approx(float(psnr(source, result)), rel=1e-6)
    assert scores.ssim == pytest.approx(float(ssim(source, result)), rel=1e-6)
    assert scores.perceptual == pytest.approx(float(loss.perceptual(source, result.clamp(-1, 1))), rel=1e-5)
    assert scores.flickering == pytest.approx(float(flickering(frames)), rel=1e-6)
    assert scores.flickering_reconstruction == pytest.approx(float(flickering(result)), rel=1e-6)
    assert scores.flickering_reconstruction != scores.flickering


def test_padding_repeats_the_edges_and_is_cut_off_again(vae):
    frames = pixels(12, height=18, width=13)
    source = to_model_range(frames)[None]
    with pytest.raises(DataError, match=r"x: .*18 x 13 pixels.*works: 20 x 12"):
        Evaluator(vae, VAELoss(RANDOM_NET)).measure("x", frames)
    with pytest.raises(
        DataError, match="11 frames would come back with 9; the nearest that work: 9, 16; or ask for padding"
    ):
        vae.reconstruct(source[:, :, :11, :16, :12])
    rows = torch.arange(20).clamp(max=17)
    columns = torch.arange(16).clamp(max=12)
    times = torch.arange(16).clamp(max=11)
    padded = source[:, :, times][:, :, :, rows][..., columns]
    expected = vae.reconstruct(padded)[:, :, :12, :18, :13]
    result = vae.reconstruct(source, pad=True)
    assert torch.equal(result, expected)
    scores = Evaluator(vae, VAELoss(RANDOM_NET), pad=True).measure("x", frames)
    assert (scores.frames, scores.height, scores.width) == (12, 18, 13)
    assert scores.psnr == pytest.approx(float(psnr(source, expected)), rel=1e-6)


def test_images_have_no_flickering_and_don_t_lower_the_mean(vae):
    evaluator = Evaluator(vae, VAELoss(RANDOM_NET))
    still, video = evaluator.measure("a", pixels(1)), evaluator.measure("b", pixels(9))
    assert still.flickering is None and still.flickering_reconstruction is None
    means = averages([still, video])
    assert means.flickering == video.flickering
    assert means.psnr == (still.psnr + video.psnr) / 2
    assert (means.frames, means.height) == (0, 16)
    assert averages([still]).flickering is None


@pytest.mark.parametrize("value", [0, 255])
def test_constant_videos_give_numbers(vae, value):
    frames = torch.full((9, 16, 16, 3), value, dtype=torch.uint8)
    scores = Evaluator(vae, VAELoss(RANDOM_NET)).measure("x", frames)
    assert all(math.isfinite(v) for v in (scores.psnr, scores.ssim, scores.perceptual, scores.flickering))


def test_an_infinite_psnr_is_null_in_json(checkpoints, videos, tmp_path, monkeypatch):
    monkeypatch.setattr("megacogvx.models.vae.CogVideoXVAE.reconstruct", lambda self, video, *_: video)
    words = ["--vae", str(checkpoints["diffusers"]), "--videos", str(videos / "a.png"), "--output", str(tmp_path)]
    assert main(["evaluate", *words]) == 0
    content = json.loads((tmp_path / "reconstruction.json").read_text())
    assert content["mean"]["psnr"] is None
    assert content["mean"]["ssim"] == 1.0


def test_what_a_folder_holds(videos, tmp_path):
    assert [file.name for file in find_files(videos)] == ["a.png", "b.mp4", "c.MP4"]
    assert find_files(videos / "b.mp4") == [videos / "b.mp4"]
    clip = Clip(path="b.mp4", caption="", frames=9, height=16, width=20, fps=8.0, source="", start=0)
    (videos / "clips.jsonl").write_text(json.dumps({**clip.model_dump(), "path": "b.mp4"}) + "\n")
    assert find_files(videos) == [videos / "b.mp4"]
    with pytest.raises(DataError, match="holds no video or image"):
        find_files(tmp_path / "nothing")


def test_what_is_read_of_a_file(videos):
    assert torch.equal(read_pixels(videos / "a.png", 9), read_image(videos / "a.png")[None])
    assert torch.equal(read_pixels(videos / "b.mp4", 5), read_frames(videos / "b.mp4")[:5])
    assert read_pixels(videos / "c.MP4", 5) is None


def test_bad_requests_end_with_a_message(checkpoints, videos, capsys):
    words = ["evaluate", "--vae", str(checkpoints["diffusers"]), "--videos", str(videos)]
    for more, message in (
        ([], "c.MP4: a clip of 4 frames would come back with 1"),
        (["--frames", "0"], "--frames 0 must be 1 or more"),
        (["--lpips-heads", "x"], "lpips_backbone"),
        (["--vae-chunk", "2"], "use chunked"),
    ):
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err
    assert main([*words[:2], str(videos), *words[3:]]) == 2, "no VAE"


def test_lpips_takes_two_files():
    assert perceptual_config(None, None).perceptual == "random_net"
    with pytest.raises(ConfigError, match="lpips_heads"):
        perceptual_config("a", None)
    assert perceptual_config("a", "b").perceptual == "lpips"


def test_nan_is_said_and_ends_nothing(checkpoints, videos, tmp_path, monkeypatch, caplog):
    plain = Evaluator.measure

    def measure(self, file, frames_THW3):
        scores = plain(self, file, frames_THW3)
        return replace(scores, psnr=math.nan, ssim=math.nan) if file == "b.mp4" else scores

    monkeypatch.setattr(Evaluator, "measure", measure)
    asked = ["evaluate", "--vae", str(checkpoints["diffusers"]), "--videos", str(videos), "--pad"]
    assert main([*asked, "--output", str(tmp_path / "out")]) == 0
    content = json.loads((tmp_path / "out" / "reconstruction.json").read_text())
    assert [row["psnr"] is None for row in (*content["files"], content["mean"])] == [False, True, False, True]
    assert "makes NaN of b.mp4" in caplog.text


def test_of_a_long_video_only_what_is_measured_is_decoded(videos, monkeypatch):
    decoded = []
    monkeypatch.setattr(video, "_upright", lambda frame: decoded.append(frame) or torch.zeros(16, 20, 3))
    assert len(read_pixels(videos / "b.mp4", 2)) == len(decoded) == 2
    assert read_pixels(videos / "c.MP4", 5) is None


def test_a_damaged_file_ends_an_evaluation_or_is_counted(checkpoints, videos, tmp_path, caplog):
    (videos / "b.mp4").write_bytes((videos / "b.mp4").read_bytes()[:600])
    asked = ["evaluate", "--vae", str(checkpoints["diffusers"]), "--videos", str(videos), "--pad"]
    asked += ["--output", str(tmp_path / "out")]
    assert main(asked) != 0 and not (tmp_path / "out").exists()
    assert main([*asked, "--skip-bad"]) == 0
    content = json.loads((tmp_path / "out" / "reconstruction.json").read_text())
    assert [row["file"] for row in content["files"]] == ["a.png", "c.MP4"]
    assert "left out: 1 x file that can't be read or measured" in caplog.text
