import importlib.util
import json
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from megacogvx.errors import DataError
from megacogvx.evaluation.ablations import (
    NAMES,
    SEEDS,
    figure_10,
    final_loss,
    finished,
    fluctuation,
    order_report,
    read_curves,
)

STEPS = 20


def _write(folder, name, seed, losses):
    run = folder / name / f"seed-{seed}"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "loss": x}) + "\n" for s, x in enumerate(losses)))
    return run


@pytest.fixture
def folder(tmp_path):
    heights = {"published": 0.5, "sinusoidal": 0.6, "2d_1d": 0.4, "shared_adaln": 0.7}
    for name in NAMES:
        for seed in SEEDS:
            jumps = (0.2 if name == "independent" else 0.1) * (-1) ** np.arange(STEPS)
            _write(tmp_path, name, seed, (heights.get(name, 0.5) + 0.01 * seed + jumps).tolist())
    return tmp_path


def test_the_report_counts_in_how_many_seeds_the_papers_order_appears(folder):
    lines = order_report(read_curves(folder)).splitlines()
    assert "not asserted" in lines[0]
    assert len(lines) == 6
    assert "loss of 3D-RoPE 0.4900 (0.4800 to 0.5000), of sinusoidal 0.5900" in lines[1]
    assert lines[1].endswith("in 3 of 3 seeds")
    assert lines[2].endswith("in 0 of 3 seeds")  # 2D+1D was better here
    assert lines[3].endswith("in 3 of 3 seeds")
    assert lines[4].endswith("in 0 of 3 seeds")  # equal is not better
    assert "fluctuation of explicit uniform 0.1" in lines[5] and lines[5].endswith("in 3 of 3 seeds")


def test_the_picture_has_four_panels_and_says_whose_runs_they_are(folder):
    drawing = figure_10(read_curves(folder))
    ET.fromstring(drawing)
    assert all(text in drawing for text in ("(a) positions", "(b) attention", "(c) modalities", "(d) timesteps"))
    assert "our own short runs" in drawing and "3 seeds each" in drawing
    assert drawing == figure_10(read_curves(folder))


@pytest.fixture
def example():
    path = Path(__file__).parents[3] / "examples" / "ablations" / "run.py"
    spec = importlib.util.spec_from_file_location("ablations_run", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_prints_every_count_and_draws_runs_that_are_there(example, folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "--output", str(folder), f"training.steps={STEPS}"])
    example.main()
    said = re.findall(r"(\w+), seed (\d+): ([\d,]+) parameters", capsys.readouterr().err)
    assert {(name, int(seed)) for name, seed, _ in said} == {(name, seed) for name in NAMES for seed in SEEDS}
    counts = {name: int(count.replace(",", "")) for name, _, count in said}
    published = counts["published"]
    assert counts["mmdit1"] == pytest.approx(published, rel=0.003) and counts["mmdit1"] != published
    assert counts["mmdit2"] > 1.3 * published and counts["shared_adaln"] < published
    assert counts["2d_1d"] == counts["sinusoidal"] == counts["independent"] == published
    assert (folder / "figure_10.svg").stat().st_size and "seed" in (folder / "order.txt").read_text()


def test_missing_runs_are_named(folder):
    (folder / "mmdit1" / "seed-2" / "metrics.jsonl").unlink()
    with pytest.raises(DataError, match="no losses of mmdit1/seed-2;"):
        read_curves(folder)


def test_a_run_is_finished_once_every_step_has_a_row(tmp_path):
    run = _write(tmp_path, "published", 0, [1.0, 0.9, 0.8])
    assert finished(run, 3) and not finished(run, 4)
    assert not finished(tmp_path / "nothing", 1)


def test_final_loss_and_fluctuation():
    losses = np.array([[8.0, 8, 8, 8, 8, 8, 2, 4]])
    assert final_loss(losses) == 3.0
    falling = np.linspace(1, 0, 40)[None]
    assert fluctuation(falling) == pytest.approx(0.0, abs=1e-9)  # a steady fall doesn't fluctuate
    noise = np.random.default_rng(0).normal(size=(1, 4000))
    assert fluctuation(noise) == pytest.approx(1.0, rel=0.05)
