"""kernels/benchmarks: the table in kernels/README.md is the script's, and says of everything unmeasured that it is."""

import importlib
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run_all():
    sys.path.insert(0, str(PROJECT / "kernels" / "benchmarks"))
    before = list(sys.path)
    yield importlib.import_module("run_all")
    sys.path[:] = [place for place in before if "benchmarks" not in place]


@pytest.fixture(scope="module")
def cases(run_all):
    return importlib.import_module("cases")


def test_the_readme_holds_the_table_of_the_latest_results(run_all):
    text = run_all.README.read_text()
    assert text.count(run_all.BEGIN) == text.count(run_all.END) == 1
    inside = text.partition(run_all.BEGIN)[2].partition(run_all.END)[0]
    assert inside.strip() == run_all.table(run_all.latest())


def test_every_row_has_something_that_measures_it(run_all, cases):
    assert set(cases.planned(1e12)) == {f"{op}: {size}" for op, size in run_all.ROWS}


def test_a_table_with_results(run_all):
    name = "{}: {}".format(*run_all.ROWS[0])
    other = "{}: {}".format(*run_all.ROWS[1])
    circumstances = {"date": "2030-01-02", "card": "C", "driver": "1", "torch": "2", "commit": "abc", "bandwidth": 4e12}
    rows = {name: {"ms": 0.5, "share": 0.9, "eager": 5.0}, other: {"note": "left out: out of time"}}
    lines = run_all.table({**circumstances, "rows": rows}).splitlines()
    assert "4.00 TB/s" in lines[0]
    assert lines[4].endswith("| 0.500 | 90% | 5.000 |  |")
    assert "left out: out of time" in lines[5]
    assert "not measured" in lines[6]


def test_a_share_is_of_the_bandwidth(cases):
    timing = importlib.import_module("timing")
    assert timing.Timed(2.0, 4e9).share_of(4e12) == pytest.approx(0.5)


def test_without_a_gpu_the_script_says_so(run_all, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["run_all.py"])
    with pytest.raises(SystemExit, match="measures on a GPU"):
        run_all.main()
