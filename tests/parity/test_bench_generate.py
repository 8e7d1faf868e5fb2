"""What `tools/bench_generate.py` compares is the same video, and its figures are what they say."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))

import bench_generate
import pytest
from bench_generate import Case, Side

from megacogvx import draws


@pytest.mark.slow
def test_both_sides_make_the_same_video_by_turns():
    small = Case(width=64, layers=1, vae_width=4, height=32, width_pixels=48, text=8, steps=2)
    ours, theirs, worst = bench_generate.compare(small, rounds=2)
    assert 0.0 < worst < 1e-4
    assert [len(side.sampling) for side in (ours, theirs)] == [len(side.decoding) for side in (ours, theirs)] == [2, 2]


def test_the_verdict_takes_equality_and_the_sum_of_both_parts(capsys):
    video = draws.normal((3, 4), 0, "video")

    def side(name, sampling, decoding):
        return Side(name, lambda: video, lambda latents: latents, [sampling, 9.0, sampling], [decoding, 9.0, decoding])

    theirs = side("diffusers", 2.0, 1.0)
    assert bench_generate.report(Case(), side("megacogvx", 2.1, 0.8), theirs, 1e-6)
    assert not bench_generate.report(Case(), side("megacogvx", 2.1, 1.0), theirs, 1e-6)
    assert not bench_generate.report(Case(), side("megacogvx", 1.0, 0.8), theirs, 1e-3)
    assert "1.050" in capsys.readouterr().out
