"""kernels/benchmarks: one failure costs one row, a second call goes on, and what isn't measured is said to be so."""

import dataclasses
import importlib
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks"


@pytest.fixture(scope="module")
def run_all():
    sys.path.insert(0, str(BENCHMARKS))
    before = list(sys.path)
    yield importlib.import_module("run_all")
    sys.path[:] = [place for place in before if "benchmarks" not in place]


def _run(run_all, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["run_all.py", *map(str, arguments)])
    return run_all.main()


def _results(folder):
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text())


def test_the_readme_holds_the_table_of_the_latest_results(run_all):
    text = run_all.kept.README.read_text()
    assert text.count(run_all.kept.BEGIN) == text.count(run_all.kept.END) == 1
    inside = text.partition(run_all.kept.BEGIN)[2].partition(run_all.kept.END)[0]
    assert inside.strip() == run_all.kept.table(run_all.kept.latest(), run_all.rows(run_all.REAL))


def test_every_size_has_its_row(run_all):
    found = run_all.rows(run_all.REAL)
    assert len(found) == len(set(found))
    for op, way, tokens, heads in itertools.product(
        run_all.bench_tokens.OPS, ("forward", "backward"), (25_000, 75_000, 700_000), (48, 24, 6)
    ):
        columns = f"{heads} heads" if op == "qk_norm_rope" else f"{64 * heads}"
        assert (f"{op} {way}", f"{tokens} tokens x {columns}") in found
    for how, pack in itertools.product(
        ("cuDNN per sample", "flash per sample", "varlen"), ("1 x 17800 tokens", "1 x 75000 tokens")
    ):
        assert (f"attention forward + backward, {how}", pack) in found
    compiled = {case.name for case in run_all.plan(run_all.REAL, 1.0) if case.name.endswith(" compiled")}
    assert {
        f"{op.rsplit(' ', 1)[0]}: {size} compiled" for op, size in found if op.startswith(run_all.bench_tokens.OPS)
    } < compiled
    tokens, width = run_all.REAL.beyond[0], run_all.REAL.head_width
    assert tokens * 48 * 3 * width > 2**31
    assert run_all.REAL.beyond[1] * 3072 > 2**31


@pytest.mark.slow
def test_a_dry_run_of_some_cases_measures_them_and_goes_on(run_all, monkeypatch, tmp_path, capsys):
    """Forward and backward of an op, group norm and the virtual ranks: the code that runs on a card, on tiny sizes."""
    readme = run_all.kept.README.read_text()
    names = ("check", "qk_norm_rope: 75 tokens x 2 heads", "group_norm_moments: 8")
    plan = run_all.plan

    def some(*arguments):
        chosen = [case for case in plan(*arguments) if not case.name.endswith("compiled")]  # that takes seconds
        return [case for case in chosen if case.name.startswith(names) or "virtual" in case.name]

    monkeypatch.setattr(run_all, "plan", some)
    assert _run(run_all, monkeypatch, "--dry-run", "--out", tmp_path) == 0
    results = _results(tmp_path)
    assert all("error" not in how for how in results["done"].values()), results["done"]
    rope = results["rows"]["qk_norm_rope backward: 75 tokens x 2 heads"]
    assert {"ms", "eager", "share"} <= set(rope)
    assert any("virtual ranks" in name and row["ms"] > 0 for name, row in results["rows"].items())
    capsys.readouterr()
    assert _run(run_all, monkeypatch, "--dry-run", "--out", tmp_path) == 0
    assert "0 s, " not in capsys.readouterr().out, "it began again"
    assert run_all.kept.README.read_text() == readme


def _case(run_all, name, measure):
    return run_all.Case(name, "1 token", (name,), measure)


def test_a_failure_costs_its_row_alone(run_all, monkeypatch, tmp_path):
    calls = []

    def good():
        calls.append("good")
        return {"good": {"ms": 1.0, "eager": 2.0}}

    def bad():
        calls.append("bad")
        raise RuntimeError("out of memory\nand more")

    def missing():
        raise ModuleNotFoundError("No module", name="liger_kernel")

    cases = [_case(run_all, name, f) for name, f in (("bad", bad), ("missing", missing), ("good", good))]
    monkeypatch.setattr(run_all, "plan", lambda *arguments: cases)
    for again in ([], [], ["--again"]):
        assert _run(run_all, monkeypatch, "--dry-run", "--out", tmp_path, *again) == 0
    assert calls == ["bad", "good", "bad"]
    rows = _results(tmp_path)["rows"]
    assert rows["good: 1 token"] == {"ms": 1.0, "eager": 2.0}
    assert rows["bad: 1 token"] == {"notes": {"ms": "RuntimeError: out of memory"}}
    assert rows["missing: 1 token"] == {"notes": {"ms": "not installed (liger_kernel)"}}
    lines = run_all.kept.table(_results(tmp_path), run_all.rows(run_all.DRY)).splitlines()
    assert "| bad | 1 token | not measured |  |  |  | RuntimeError: out of memory |" in lines
    assert "| good | 1 token | 1.000 |  | 2.000 |  |  |" in lines


def test_what_was_measured_is_on_disk_when_the_process_ends(run_all, monkeypatch, tmp_path):
    """The case during which it ended isn't begun again: it would end the next one too."""

    def ends():
        raise KeyboardInterrupt

    cases = [_case(run_all, "first", lambda: {"first": {"ms": 1.0}}), _case(run_all, "ends", ends)]
    cases.append(_case(run_all, "last", lambda: {"last": {"ms": 3.0}}))
    monkeypatch.setattr(run_all, "plan", lambda *arguments: cases)
    with pytest.raises(KeyboardInterrupt):
        _run(run_all, monkeypatch, "--dry-run", "--out", tmp_path)
    assert _results(tmp_path)["done"]["ends"]["error"] == "the process ended"
    assert _run(run_all, monkeypatch, "--dry-run", "--out", tmp_path) == 0
    assert {"first: 1 token", "last: 1 token"} == set(_results(tmp_path)["rows"])


def test_time_and_a_lost_card_end_a_run_in_order(run_all, monkeypatch, tmp_path):
    cases = [_case(run_all, name, lambda name=name: {name: {"ms": 1.0}}) for name in ("one", "two")]
    monkeypatch.setattr(run_all, "plan", lambda *arguments: cases)
    assert _run(run_all, monkeypatch, "--dry-run", "--out", tmp_path / "time", "--seconds", -1) == 3
    assert _results(tmp_path / "time")["rows"] == {}
    monkeypatch.setattr(run_all, "_is_card_alive", lambda scale: False)
    for left in (4, 4, 0):
        assert _run(run_all, monkeypatch, "--dry-run", "--out", tmp_path / "lost") == left
    assert len(_results(tmp_path / "lost")["rows"]) == 2


def test_a_copy_of_the_repository_is_told_its_commit(run_all, monkeypatch, tmp_path):
    """Without .git it can't know it."""
    monkeypatch.setattr(run_all.kept, "_said", lambda *command: "unknown")
    monkeypatch.setattr(run_all, "plan", lambda *arguments: [_case(run_all, "one", lambda: {"one": {"ms": 1.0}})])
    for arguments, expected in ((["--commit", "abc1234"], "abc1234"), ([], "abc1234"), (["--commit", "d"], "d")):
        assert _run(run_all, monkeypatch, "--dry-run", "--out", tmp_path, *arguments) == 0
        assert _results(tmp_path)["commit"] == expected


def test_results_of_other_sources_or_cards_are_left_alone(run_all, tmp_path):
    fresh = {**run_all.kept.circumstances("abc"), "date": "2030-01-02"}
    run_all.kept.save({**fresh, "rows": {"a": {}}}, tmp_path)
    assert run_all.kept.resume(fresh, [tmp_path])["rows"] == {"a": {}}
    for change in ({"sources": "abd"}, {"card": "another"}, {"torch": "1.0"}):
        assert run_all.kept.resume({**fresh, **change}, [tmp_path])["rows"] == {}


def test_a_table_with_results(run_all):
    rows = [("a forward", "1"), ("a backward", "1"), ("b", "2"), ("c", "3")]
    measured = {
        "a forward: 1": {"ms": 0.5, "share": 0.9, "eager": 5.0},
        "a backward: 1": {"ms": 0.5, "share": 0.5, "notes": {"eager": "out of memory"}},
        "b: 2": {"ms": 1.0, "share": 0.5, "reason": "latency of the shuffles", "tflops": 400.0},
    }
    results = {**run_all.kept.circumstances("abc"), "bandwidth": 4e12, "rows": measured, "said": ["It is so."]}
    results["done"] = {"check: a": {"seconds": 1}, "check: b": {"error": "off"}}
    lines = run_all.kept.table(results, rows).splitlines()
    assert "4.00 TB/s" in lines[0]
    assert lines[4:8] == [
        "| a forward | 1 | 0.500 | 90% | 5.000 |  |  |",
        "| a backward | 1 | 0.500 | 50% |  |  | reason not yet profiled; eager: out of memory |",
        "| b | 2 | 1.000 | 50% |  |  | 400 TFLOP/s; latency of the shuffles |",
        "| c | 3 | not measured |  |  |  |  |",
    ]
    assert lines[9:] == ["- check: a: held.", "- check: b: off.", "- It is so."]


def test_the_fastest_attention_is_named_with_its_margin(run_all):
    rows = {"attention forward + backward, varlen: 1 x 75000 tokens": {"ms": 3.0}}
    assert run_all.bench_attention.fastest(rows, run_all.REAL) == []
    rows["attention forward + backward, cuDNN per sample: 1 x 75000 tokens"] = {"ms": 2.0}
    (said,) = run_all.bench_attention.fastest(rows, run_all.REAL)
    assert said == "Attention, 1 x 75000 tokens: cuDNN per sample is fastest; 1.50 x the time with varlen."


def test_one_way_that_fails_leaves_the_others(run_all):
    def fails(x):
        raise RuntimeError("no kernel image")

    x = torch.zeros(4, 2)
    ways = {"ms": lambda x: (2 * x,), "eager": fails}
    found = run_all.timing.both_ways(ways, (x,), (), (64.0, 96.0), 1e9, run_all.DRY)
    for each, least in (("forward", 64.0), ("backward", 96.0)):
        assert found[each]["notes"] == {"eager": "RuntimeError: no kernel image"}
        assert found[each]["share"] == pytest.approx(least / found[each]["ms"] / 1e6)


def test_a_halo_that_arrives_wrong_is_seen(run_all, monkeypatch):
    """Virtual ranks go through the exchange's own code: frames of the wrong slot are no whole clip's."""
    mailbox = run_all.bench_clips.peer_memory.Mailbox
    right = mailbox._next

    def wrong(self, counts, to):
        count, slot, first = right(self, counts, to)
        return count, slot, first if counts is self.sent else self.capacity - first

    monkeypatch.setattr(mailbox, "_next", wrong)
    with pytest.raises(AssertionError, match="the halo before frame"):
        run_all.bench_clips.virtual_ranks(run_all.DRY)


def test_without_a_gpu_the_script_says_so(run_all, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="measures on a GPU"):
        _run(run_all, monkeypatch)


def test_the_card_is_busy_while_a_call_is_handed_over(run_all, monkeypatch):
    """So that the time between the events is the card's, however long the host takes."""
    happened = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            happened.append("record")

        def synchronize(self):
            happened.append("wait")

        def elapsed_time(self, end):
            return 1.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: happened.append("sleep"))
    assert run_all.timing._on_gpu(happened.append, ("call",)) == 1.5
    assert happened == ["sleep", "record", "call", "record", "wait"]


@pytest.mark.parametrize(
    ("capability", "there", "expected"),
    [((9, 0), [80, 90, 100], "is there"), ((9, 0), [], 90), ((9, 0), [80], 90), ((8, 6), [], 80), ((12, 0), [], 100)],
)
def test_a_library_that_fits_the_card_is_taken_else_built_for_it(run_all, monkeypatch, capability, there, expected):
    built = []
    toolchain = run_all.toolchain
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(toolchain, "built_for", lambda folder: there)
    tools = lambda wanted, architectures: toolchain.Tools("g++", Path("torch"), Path("nvcc"), architectures)  # noqa: E731
    monkeypatch.setattr(toolchain, "find_tools", tools)
    monkeypatch.setattr(toolchain, "compile_library", lambda tools, *folders: built.append(tools.architectures))
    said = run_all._library(run_all.REAL)
    if expected == "is there":
        assert (built, said) == ([], "the library that is there, for sm_80, sm_90, sm_100")
    else:
        assert built == [(expected,)]
        assert f"sm_{expected}" in said


def test_a_library_that_is_nowhere_and_cannot_be_built_ends_the_run_but_no_dry_one(run_all, monkeypatch):
    def cannot(wanted, architectures):
        raise run_all.toolchain.BuildError("no nvcc found")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(run_all.toolchain, "built_for", lambda folder: [])
    monkeypatch.setattr(run_all.toolchain, "find_tools", cannot)
    assert "none can be built here: no nvcc found" in run_all._library(run_all.DRY)
    with pytest.raises(SystemExit, match="no nvcc found"):
        run_all._library(run_all.REAL)


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_program_that_does_not_answer_leaves_no_process_behind(run_all, monkeypatch, tmp_path):
    monkeypatch.setattr(run_all.bench_clips, "PATIENCE", 0.3)
    with pytest.raises(RuntimeError, match="no answer within"):
        run_all.bench_clips._output(["sh", "-c", f"sleep 60 & echo $! > {tmp_path}/pid; wait"])
    pid = int((tmp_path / "pid").read_text())
    until = time.monotonic() + 20.0  # a killed process may still be about to end
    while _runs(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _runs(pid)
    assert run_all.bench_clips._output(["sh", "-c", "echo one; echo two"]) == "two"
    with pytest.raises(RuntimeError, match=r"^off$"):
        run_all.bench_clips._output(["sh", "-c", "echo more >&2; echo off >&2; echo >&2; exit 1"])


@pytest.mark.gpu
def test_every_case_runs_on_a_card(run_all):
    """The dry run's sizes with the card's kernels: checks, streams of the virtual ranks, two processes, attention."""
    scale = dataclasses.replace(run_all.DRY, device="cuda", compiler="inductor")
    for case in run_all.plan(scale, 1e12):
        try:
            found = case.measure()
        except ImportError:
            continue  # a peer
        for op, figures in (found or {}).items():
            assert not figures.get("notes"), (case.name, op, figures)


@pytest.mark.slow
def test_a_dry_run_of_everything(tmp_path):
    """In a process of its own, with whatever peers are installed."""
    command = [sys.executable, str(BENCHMARKS / "run_all.py"), "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    failed = {name: how["error"] for name, how in _results(tmp_path)["done"].items() if "error" in how}
    assert all(error.startswith("not installed") for error in failed.values()), failed
