"""The report holds what the run folders hold, needs no other file, and says what is missing."""

import argparse
import base64
import html
import json
import re

import numpy as np
import pytest
import torch

from megacogvx.data.images import write_png
from megacogvx.data.indexed import DatasetWriter, EncoderInfo, finish_dataset
from megacogvx.errors import ConfigError
from megacogvx.evaluation import charts, page, report, sections
from megacogvx.evaluation.run_folder import RunFolder
from megacogvx.inference.video_file import write_mp4


def training_rows(steps=60):
    for step in range(steps):
        yield {
            "step": step, "loss": 1.0 if step < 6 else 0.5, "grad_norm": 1.0, "lr": 1e-3, "tokens": 100, "samples": 4,
            "seconds": 0.25, "pack_fill": 0.75, "balance": 1.25,
            "loss_by_interval": [None] + [0.1 * i for i in range(1, 10)],
            "layout": "tp2 cp1 dp1" if step < 30 else "tp1 cp2 dp1",
        }  # fmt: skip


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def inputs(tmp_path):
    return write_inputs(tmp_path)


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A folder of inputs and the report on them, which several tests read: drawing it takes seconds."""
    folder = write_inputs(tmp_path_factory.mktemp("reported"))
    report.run(whole(folder))
    return folder


def write_inputs(tmp_path):
    run, vae, samples = tmp_path / "run", tmp_path / "vae", tmp_path / "samples"
    write_rows(run / "metrics.jsonl", training_rows())
    (run / "config.yaml").write_text("model:\n  preset: tiny  # <kept>\n")
    vae_rows = [{"step": s, "loss": 0.5, "l1": 0.4, "perceptual_random_net": 0.1, "kl": 20.0} for s in range(8)]
    vae_rows[7]["psnr"] = 21.456
    write_rows(vae / "metrics.jsonl", vae_rows)
    (vae / "config.yaml").write_text("vae:\n  preset: tiny\n")
    write_png(vae / "reconstructions" / "clip0.png", torch.zeros(8, 8, 3, dtype=torch.uint8))
    write_mp4(torch.zeros(9, 16, 32, 3, dtype=torch.uint8), samples / "sample-000.mp4", 8)
    (samples / "sample-000.json").write_text(json.dumps({"prompt": 'a <b>fox</b> & "friends"', "num_steps": 25}))
    encoder = EncoderInfo(
        text_kind="real", text_length=8, text_width=4, latent_channels=2, latent_scale_factor=0.5,
        vae_fingerprint="v", text_encoder_fingerprint="t",
    )  # fmt: skip
    writer = DatasetWriter(tmp_path / "dataset", encoder)
    for number, frames in enumerate((1, 3, 3)):
        latents, text = torch.zeros(frames, 4, 6, 4, dtype=torch.bfloat16), torch.zeros(5, 4, dtype=torch.bfloat16)
        writer.add_item(latents=latents, text=text, sample_id=number, metadata={})
    writer.finalize()
    finish_dataset(tmp_path / "dataset")
    steps = {
        "train": {"seconds": 90.0, "command": ["/opt/somewhere/python3.11", "-m", "megacogvx"]},
        "encode": {"seconds": 5.25},
    }
    (tmp_path / "steps.json").write_text(json.dumps(steps))
    return tmp_path


def options(*words):
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def whole(folder):
    return options(
        "--train-run", folder / "run", "--vae-run", folder / "vae", "--samples", folder / "samples",
        "--dataset", folder / "dataset", "--steps-file", folder / "steps.json", "--output", folder / "report.html",
    )  # fmt: skip


def words_of(content):
    """The page's text without markup."""
    bare = re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", content, flags=re.DOTALL))
    return re.sub(r"\s+", " ", html.unescape(bare))


def test_page_needs_no_other_file(reported):
    content = (reported / "report.html").read_text()
    assert set(re.findall(r'(?:src|href)="(\w*:?)', content)) <= {"data:", "#", ""}
    assert not re.search(r"<script|<link|@import|url\((?!#)", content)
    assert "default-src 'none'" in content
    assert not list(reported.glob("*.part"))


def test_a_vae_with_lpips_discriminator_and_averages_is_drawn(inputs):
    rows = [{"step": s, "l1": 0.4, "lpips": 0.3, "kl": 20.0, "psnr": 20.0 + s, "psnr_ema": 21.0 + s} for s in range(4)]
    for row in rows[2:]:
        row |= {"discriminator": 0.9, "logits_real": 0.2, "logits_fake": -0.1}
    (inputs / "vae" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = report.build(whole(inputs))
    for expected in ("LPIPS", "PSNR of averaged weights", "logits of reconstructions"):
        assert expected in content, expected
    assert "random net" not in content and "random weights" not in words_of(content)


def test_page_holds_what_the_folders_hold(reported):
    content = (reported / "report.html").read_text()
    text = words_of(content)
    for expected in (
        "1.000 → 0.500", "75.0 %", "tp2 cp1 dp1 → tp1 cp2 dp1", "21.5 dB", "60 steps, 240 samples, 6,000 tokens",
        "0.25 s (median)", "best 21.46 dB", "3 samples in 1 shard(s)", "3 x 4 x 6", "1 min 30 s", "5.2 s", "1 min 35 s",
        "fill 0.7500, balance 1.2500", "preset: tiny # <kept>", "python -m megacogvx", "random weights",
        "clip0: above the original",
    ):  # fmt: skip
        assert expected in text, expected
    assert "Missing" not in text
    assert "/opt/somewhere" not in content
    film = base64.b64encode((reported / "samples" / "sample-000.mp4").read_bytes()).decode()
    assert f"data:video/mp4;base64,{film}" in content
    assert base64.b64encode((reported / "vae" / "reconstructions" / "clip0.png").read_bytes()).decode() in content


def test_text_is_escaped(reported):
    content = (reported / "report.html").read_text()
    assert "<b>fox" not in content
    assert "a &lt;b&gt;fox&lt;/b&gt; &amp; &quot;friends&quot;" in content


def test_missing_parts_are_said_to_be_missing(inputs, tmp_path):
    text = words_of(report.build(options("--train-run", inputs / "run")))
    for option in ("--samples", "--vae-run", "--dataset", "--steps-file"):
        assert f"{option} was not given" in text
    empty = tmp_path / "empty"
    empty.mkdir()
    text = words_of(
        report.build(options("--train-run", empty, "--vae-run", empty, "--samples", empty, "--dataset", empty))
    )
    for said in ("metrics.jsonl (no curves)", "config.yaml (no resolved config)", "reconstructions holds no picture",
                 "holds no MP4 file", "is not a dataset", "The VAE was not measured"):  # fmt: skip
        assert said in text, said
    with pytest.raises(ConfigError, match="nothing to report on"):
        report.run(options())


def test_columns_that_are_missing_are_said(inputs):
    write_rows(inputs / "run" / "metrics.jsonl", ({"step": s, "loss": 1.0} for s in range(5)))
    text = words_of(report.build(options("--train-run", inputs / "run")))
    assert "loss_by_interval in metrics.jsonl" in text
    assert "pack_fill and balance in metrics.jsonl" in text
    assert "an unknown number of samples" in text


def test_broken_lines_and_numbers_are_left_out(inputs):
    path = inputs / "run" / "metrics.jsonl"
    write_rows(path, [{"step": 1, "loss": 9.0}, {"step": 0, "loss": 2.0}, {"step": 1, "loss": float("nan")}])
    path.write_text(path.read_text() + '{"step": 2, "lo')
    run = RunFolder.read(inputs / "run")
    assert run.steps == [0, 1]
    assert run.column("loss") == [2.0, None]
    assert [problem.split(" of ")[0] for problem in run.problems] == ["1 line(s)"]


def test_a_damaged_video_is_named(inputs):
    (inputs / "samples" / "sample-000.mp4").write_bytes(b"nothing")
    assert "can't be decoded" in words_of(report.build(options("--samples", inputs / "samples")))


def test_videos_beyond_the_limit_are_left_out(inputs, monkeypatch):
    monkeypatch.setattr(sections, "MAX_VIDEO_BYTES", 10)
    content = report.build(options("--samples", inputs / "samples"))
    assert "data:video" not in content
    assert "Missing: sample-000.mp4 itself" in words_of(content)


def test_layout_changes_are_marked():
    steps = list(range(10))
    drawing = charts.lines(steps, [charts.Line("loss", [1.0] * 10)], "loss", marks=[(0, "tp2"), (5, "cp2")])
    assert "tp2" in drawing
    assert "cp2" in drawing
    unmarked = charts.lines(steps, [charts.Line("loss", [1.0] * 10)], "loss", marks=[(0, "tp2")])
    assert (drawing.count("stroke-dasharray"), unmarked.count("stroke-dasharray")) == (1, 0)


def test_means_leave_gaps_where_there_is_nothing():
    means = charts._mean(np.array([[1.0, np.nan, np.nan], [3.0, 4.0, np.nan]]))
    assert means[:2].tolist() == [2.0, 4.0]
    assert np.isnan(means[2])
    assert charts.moving_mean(np.array([0.0, 3.0, 6.0, 9.0]), 1).tolist() == [1.5, 3.0, 6.0, 7.5]


def test_charts_repeat_and_carry_a_name():
    drawings = [charts.interval_bars([0.1, None, 0.3], 1000) for _ in range(2)]
    assert drawings[0] == drawings[1]
    assert drawings[0].startswith('<svg role="img" aria-label="mean loss by timestep interval"')


def test_durations():
    assert [sections.duration(seconds) for seconds in (0.04, 12.34, 59.9, 125)] == [
        "0.0 s",
        "12.3 s",
        "59.9 s",
        "2 min 05 s",
    ]


def test_table_draws_shares_as_bars():
    drawn = page.table(("a", "b"), [("x", 1, 0.5), ("y", 2, 1.0)], numbers=(1,), bar=True)
    assert re.findall(r"width:([\d.]+)%\"></span>", drawn) == ["50.0", "100.0"]
    assert '<td class="number">2</td>' in drawn
