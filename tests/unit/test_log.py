"""Rank 0 speaks, the others only warn; progress hands on every item and tells the time left."""

import io

import pytest

from megacogvx import log


@pytest.fixture
def lines(capsys):
    """Everything the logger writes during a test, with the rank put back afterwards."""
    log.get_logger("megacogvx")
    seen: list[str] = []

    def read() -> list[str]:
        seen.extend(capsys.readouterr().err.splitlines())
        return seen

    yield read
    log.set_rank(0)


def test_rank_zero_informs_without_a_level_or_coordinates(lines):
    log.set_rank(0, "dp0 cp0 tp0")
    log.get_logger(__name__).info("loss %.1f", 0.25)
    (line,) = lines()
    assert line.endswith(" loss 0.2")
    assert "INFO" not in line
    assert "dp0" not in line


def test_rank_zero_warns_with_its_coordinates(lines):
    log.set_rank(0, "dp0 cp0 tp0")
    log.get_logger("megacogvx.data").warning("a sample is bad")
    assert lines()[0].endswith("[dp0 cp0 tp0] WARNING a sample is bad")


def test_other_ranks_are_silent_until_they_warn(lines):
    log.set_rank(3, "dp0 cp1 tp1")
    log.get_logger("megacogvx.data").info("not for the terminal")
    log.get_logger("megacogvx.data").error("a sample is bad")
    assert [line[9:] for line in lines()] == ["[dp0 cp1 tp1] ERROR a sample is bad"]


def test_asking_twice_does_not_write_twice(lines):
    for _ in range(3):
        logger = log.get_logger("megacogvx.data")
    logger.info("once")
    assert len(lines()) == 1


def test_names_outside_the_package_go_through_the_same_logger(lines):
    assert log.get_logger("tools.demo").name == "megacogvx.tools.demo"
    log.get_logger("__main__").info("heard")
    assert lines()[0].endswith("heard")


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves itself."""
    now = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    return now


def work(clock, items, seconds):
    for item in items:
        clock[0] += seconds
        yield item


def test_progress_in_a_file_writes_a_line_every_ten_seconds(lines, clock):
    seen = list(log.progress(work(clock, range(10), 4.0), "encode", total=10))
    assert seen == list(range(10))
    assert [line[9:] for line in lines()] == [
        "encode: 3 of 10, 0.25 a second, 28 s left",
        "encode: 6 of 10, 0.25 a second, 16 s left",
        "encode: 9 of 10, 0.25 a second, 4 s left",
    ]


def test_progress_without_a_total_does_not_guess(lines, clock):
    assert list(log.progress(work(clock, "ab", 11.0), "scan")) == ["a", "b"]
    assert [line[9:] for line in lines()] == ["scan: 1 of ?, 0.0909 a second", "scan: 2 of ?, 0.0909 a second"]


def test_progress_takes_the_total_from_a_sequence(lines, clock):
    for _ in log.progress(["a", "b"], "scan"):
        clock[0] += 11.0
    assert [line[9:] for line in lines()] == [
        "scan: 1 of 2, 0.0909 a second, 11 s left",
        "scan: 2 of 2, 0.0909 a second, 0 s left",
    ]


def progress_on_a_terminal(monkeypatch, rank):
    """Run `progress` over five items with a standard error stream that is a terminal; return what it showed."""
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    log.set_rank(rank)
    with monkeypatch.context() as patch:
        patch.setattr(log.sys, "stderr", stream)
        assert list(log.progress(range(5), "encode")) == [0, 1, 2, 3, 4]
    return stream.getvalue()


def test_progress_on_a_terminal_hands_on_every_item(monkeypatch, lines):
    shown = progress_on_a_terminal(monkeypatch, rank=0)
    assert "encode" in shown
    assert "5/5" in shown


def test_other_ranks_show_no_progress(monkeypatch, lines):
    assert progress_on_a_terminal(monkeypatch, rank=1) == ""
