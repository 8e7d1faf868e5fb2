"""metrics.jsonl holds each step once, whatever was interrupted."""

import json

from megacogvx.training.metrics import MetricsFile


def rows(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_resumed_run_drops_the_steps_that_it_does_again(tmp_path):
    first = MetricsFile(tmp_path, 0, writes=True)
    for step in range(5):
        first.add({"step": step, "loss": 1.0})
    resumed = MetricsFile(tmp_path, 3, writes=True)
    resumed.add({"step": 3, "loss": 0.5})
    assert rows(tmp_path) == [0, 1, 2, 3]


def test_a_row_cut_off_by_a_crash_is_dropped(tmp_path):
    MetricsFile(tmp_path, 0, writes=True).add({"step": 0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')
    MetricsFile(tmp_path, 2, writes=True).add({"step": 2})
    assert rows(tmp_path) == [0, 2]


def test_other_ranks_write_nothing(tmp_path):
    MetricsFile(tmp_path, 0, writes=False).add({"step": 0})
    assert not (tmp_path / "metrics.jsonl").exists()
