"""kernels/prove.py: the pieces are the whole proof, what passed isn't run again, nothing that was skipped passes."""

import importlib
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
TESTS = """
import pytest
def test_shapes(record_property):
    record_property("shapes", 7)
def test_more(record_property):
    record_property("shapes", 5)
def test_skipped():
    pytest.skip("no compiler")
"""


@pytest.fixture
def prove(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(PROJECT / "kernels"))
    found = importlib.import_module("prove")
    monkeypatch.setattr(found, "PROOF", tmp_path / "proof")
    (tmp_path / "proof").mkdir()
    return found


def _says(prove, name, output, status=0):
    return prove.Piece(name, [sys.executable, "-c", f"import sys; print({output!r}); sys.exit({status})"])


def _main(prove, monkeypatch, pieces, *arguments):
    monkeypatch.setattr(prove, "pieces", lambda *sizes: pieces)
    monkeypatch.setattr(sys, "argv", ["prove.py", *arguments])
    return prove.main()


def test_the_pieces_are_the_whole_proof(prove, toolchain):
    found = prove.pieces(600, 120)
    names = [piece.name for piece in found]
    assert len(names) == len(set(names))
    assert {f"machine code of sm_{each}" for each in toolchain.ARCHITECTURES} < set(names)
    parts = {start: [] for start in ("shapes ", "AddressSanitizer, shapes ")}
    for piece in found:
        for start, of in parts.items():
            if piece.name.startswith(start):
                begin, end = map(int, piece.environment["MEGACOGVX_KERNELS_SHAPES"].split(":"))
                of += range(begin, end)
                assert ("LD_PRELOAD" in piece.environment) == start.startswith("Address")
    assert parts["shapes "] == list(range(600))
    assert parts["AddressSanitizer, shapes "] == list(range(120))
    (rest,) = (piece for piece in found if piece.name == "tests")
    assert rest.command[-2:] == ["-k", "not random_shapes and not keeps_its_budget"]


def test_what_passed_is_not_run_again(prove, monkeypatch, capsys):
    pieces = [
        _says(prove, "machine code of sm_1", "3 passed, 0 failed"),
        _says(prove, "machine code of sm_2", "off", 1),
    ]
    assert _main(prove, monkeypatch, pieces) == 1
    assert "off" in capsys.readouterr().out
    pieces = [
        _says(prove, "machine code of sm_1", "off", 1),
        _says(prove, "machine code of sm_2", "4 passed, 0 failed"),
    ]
    assert _main(prove, monkeypatch, pieces, "--list") == 0
    assert "passed  machine code of sm_1\nto do   machine code of sm_2" in capsys.readouterr().out
    assert _main(prove, monkeypatch, pieces, "--minutes", "-1") == 3
    assert _main(prove, monkeypatch, pieces) == 0
    assert "2 of 2 pieces: 7 kernels within their budgets" in capsys.readouterr().out
    monkeypatch.setattr(prove, "state", lambda: "of other sources")
    assert _main(prove, monkeypatch, pieces) == 1, "it passed with other sources"


def test_a_budget_that_is_broken_or_nothing_said_fails(prove, tmp_path):
    for output in ("3 passed, 1 failed", "0 passed, 0 failed", "nothing"):
        assert prove.run(_says(prove, "machine code of sm_1", output), tmp_path / "report.xml") is None


@pytest.mark.slow
def test_shapes_are_counted_and_a_skipped_test_fails(prove, tmp_path):
    (tmp_path / "test_made.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    with_skipped = prove.Piece("shapes 0:12", command)
    assert prove.run(with_skipped, tmp_path / "report.xml") is None
    without = prove.Piece("shapes 0:12", [*command, "-k", "not skipped"])
    found = prove.run(without, tmp_path / "report.xml")
    assert (found["passed"], found["shapes"]) == (2, 12)
