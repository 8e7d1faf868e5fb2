"""Conversions of a 5B-shaped checkpoint, full width and few layers, keep to their memory and to every bit."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "measure_conversion.py"


@pytest.mark.slow
def test_a_5b_shaped_checkpoint_goes_round_within_its_memory(tmp_path):
    command = [sys.executable, str(TOOL), "--layers", "2", "--folder", str(tmp_path / "checkpoints")]
    done = subprocess.run([*command, "--max-shard-bytes", str(5 * 10**8)], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the last equals the first bit for bit: True" in done.stdout
    assert not (tmp_path / "checkpoints").exists()
