"""metrics.jsonl holds each step once, whatever was interrupted."""

import json
import math
import os
from types import SimpleNamespace

import pytest
import torch

from megacogvx.errors import DataError
from megacogvx.training import metrics
from megacogvx.training.metrics import Meter, MetricsFile, peak_flops


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


def test_numbers_that_are_not_finite_stay_readable(tmp_path):
    MetricsFile(tmp_path, 0, writes=True).add(
        {"step": 0, "loss": math.nan, "by": [1.0, -math.inf], "a": {"b": math.inf}}
    )
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert row == {"step": 0, "loss": "nan", "by": [1.0, "-inf"], "a": {"b": "inf"}}


def test_a_row_that_does_not_fit_names_the_file(tmp_path):
    file = MetricsFile(tmp_path, 0, writes=True)
    file.path.symlink_to("/dev/full")
    with pytest.raises(DataError, match=r"metrics\.jsonl can't take a row of .* bytes: .*No space left"):
        file.add({"step": 0})


def test_a_kill_while_old_rows_are_dropped_loses_none(tmp_path, monkeypatch):
    file = MetricsFile(tmp_path, 0, writes=True)
    for step in range(4):
        file.add({"step": step})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricsFile(tmp_path, 2, writes=True)
    assert rows(tmp_path) == [0, 1, 2, 3]


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_rates_are_of_the_whole_step_and_flops_of_one_rank(monkeypatch):
    clock, groups = Clock(), SimpleNamespace(world_size=4, device=torch.device("cpu"))
    monkeypatch.setattr(metrics, "peak_flops", lambda device: 2e12)
    meter = Meter(10, groups, clock)
    clock.now = 0.5
    meter.start_step()
    clock.now = 2.0
    row = meter.end_step({"samples": 6, "tokens": 1000, "flops": 8e12})
    assert row.pop("memory_gb") > 0
    assert row == {
        "seconds": 2.0, "data_wait": 0.5, "samples_per_second": 3.0, "tokens_per_second": 500.0, "tflops": 1.0,
        "mfu": 0.5,
    }  # fmt: skip
    assert meter.seconds_left() == 18.0
    clock.now = 3.0  # a checkpoint is begun
    meter.wait_for_data()
    clock.now = 6.0
    meter.start_step()
    assert meter.end_step({})["data_wait"] == 3.0 and meter.seconds_left() == 8 * 3.0


def test_peaks_are_known_by_the_longest_name(monkeypatch):
    assert peak_flops(torch.device("cpu")) is None
    for name, peak in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA RTX A4000", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda", 0)) == peak
