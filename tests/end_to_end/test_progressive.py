"""The four tiny stages run in sequence, each from the last one's weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_four_stages_follow_one_another(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [PROJECT / "examples" / "progressive_tiny.sh", tmp_path / "run"], cwd=PROJECT, env=environment, text=True,
        capture_output=True, timeout=290,
    )  # fmt: skip
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    for stage in (1, 2, 3, 4):
        rows = (tmp_path / "run" / "runs" / f"stage{stage}" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows] == list(range(6))
    grown = [line.partition("grown: ")[2] for line in text.splitlines() if "grown: " in line]
    assert grown[0] == grown[2] == "nothing"
    assert "embedding.video_proj.weight" in grown[1] and "head.proj.weight" in grown[1]
