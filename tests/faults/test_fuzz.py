"""A few mutations of every parser, and a few kills; `make fuzz` runs thousands."""

import pytest

from megacogvx.errors import DataError
from megacogvx.testing.fuzz import fuzz, mutate
from megacogvx.testing.fuzz_targets import targets
from megacogvx.testing.kill_writer import fill_and_resume, kill_and_resume


@pytest.mark.parametrize(
    "name",
    [
        "index", "bin", "manifest", "column", "recover", "fields-index", "fields-bin", "fields-recover", "tar", "pt",
        "safetensors", "megatron", "captions", "clip-list", "video",
    ],
)  # fmt: skip
def test_damaged_files_are_refused_or_read_the_same(tmp_path, name):
    target = targets(tmp_path)[name]()
    report = fuzz(target.path, target.parse, range(12), mutation=target.mutation)
    assert not report.findings
    assert sum(report.outcomes.values()) == 12


def test_the_fuzzer_sees_what_it_is_there_for(tmp_path):
    """A parser that trusts its input: wrong data, another exception, memory, a crash."""
    path = tmp_path / "x"
    path.write_bytes(b"\1" * 40)

    def parse():
        data = path.read_bytes()
        if len(data) < 40:
            raise DataError("short")
        if data[0] & 2:
            raise ValueError("x")
        if data[0] & 4:
            bytearray(1 << 40)
        if data[0] & 8:
            import ctypes

            ctypes.string_at(0)
        return data

    def mutation(data, seed):
        return {0: data, 1: data[:-1], 2: b"\2" + data, 3: b"\4" + data, 4: b"\x08" + data, 5: b"\x10" + data}[seed]

    report = fuzz(path, parse, range(6), mutation=mutation)
    kinds = [kind for _, kind, _ in report.findings]
    assert kinds == ["other exception", "out of memory", "crash or hang", "different result"]
    assert report.outcomes["equal"] == report.outcomes["typed error"] == 1
    assert path.read_bytes() == b"\1" * 40


def test_mutations_are_a_function_of_the_seed():
    data = bytes(range(256))
    assert [mutate(data, seed) for seed in range(30)] == [mutate(data, seed) for seed in range(30)]
    assert len({mutate(data, seed) for seed in range(30)}) > 25


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_a_random_moment_nothing_finished_is_lost(tmp_path, seed):
    assert kill_and_resume(tmp_path / "dataset", seed) == ""


@pytest.mark.parametrize("seed", range(4))
def test_on_a_disk_that_fills_up_nothing_finished_is_lost(tmp_path, seed):
    assert fill_and_resume(tmp_path / "dataset", seed) == ""
