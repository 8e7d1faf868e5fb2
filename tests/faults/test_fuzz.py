"""A few mutations of every parser, and a few kills; `make fuzz` runs thousands."""

import os
import shutil
import subprocess
import time

import pytest

import megacogvx.testing.fuzz
from megacogvx.errors import DataError
from megacogvx.testing.fuzz import fuzz, mutate
from megacogvx.testing.fuzz_targets import targets
from megacogvx.testing.kill_writer import SAMPLES, SHARDS, fill_and_resume, finish_and_compare, kill_and_resume
from megacogvx.testing.tiny_dataset import write_tiny_dataset


@pytest.mark.parametrize(
    "name",
    [
        "index", "bin", "manifest", "column", "recover", "fields-index", "fields-bin", "fields-recover", "tar", "pt",
        "safetensors", "megatron", "captions", "clip-list", "video",
    ],
)  # fmt: skip
def test_damaged_files_are_refused_or_read_the_same(tmp_path, name):
    target = targets(tmp_path)[name]()
    report = fuzz(target.path, target.parse, range(48), mutation=target.mutation, slack=target.slack)
    assert not report.findings
    assert sum(report.outcomes.values()) == 48


@pytest.mark.parametrize("name", ["index", "column", "bin", "recover"])
def test_single_bits_all_over_a_file(tmp_path, name):
    """Random mutations of a small file mostly hit its header; these flips leave no gap of a hundredth of it."""

    def flip(data, seed):
        bit = int(8 * len(data) * (seed * 0.6180339887498949 % 1))  # evenly spread, however many are drawn
        return data[: bit // 8] + bytes([data[bit // 8] ^ (1 << bit % 8)]) + data[bit // 8 + 1 :]

    target = targets(tmp_path)[name]()
    report = fuzz(target.path, target.parse, range(128), mutation=flip, slack=target.slack)
    assert not report.findings


def test_the_fuzzer_sees_what_it_is_there_for(tmp_path, monkeypatch):
    """A parser that trusts its input: another exception, memory, a crash, a hang, wrong data; seeds after it go on."""
    path = tmp_path / "x"
    path.write_bytes(b"\1" * 40)

    def parse():
        data = path.read_bytes()
        if len(data) < 40:
            raise DataError(f"{path} is short" if data[0] & 1 else "something is short")
        if data[0] & 2:
            raise ValueError("x")
        if data[0] & 4:
            bytearray(64 << 20)  # too much for what the allocator may have kept
        if data[0] & 8:
            import ctypes

            ctypes.string_at(0)
        if data[0] & 32:
            time.sleep(60)
        return data

    def mutation(data, seed):
        return bytes([(1, 3, 5, 9, 1, 33, 17, 0, 1)[seed]]) + data[1 : 39 if seed in (4, 7) else 40]

    monkeypatch.setattr(megacogvx.testing.fuzz, "HANG_SECONDS", 1)
    report = fuzz(path, parse, range(9), mutation=mutation)
    assert {seed: kind for seed, kind, _ in report.findings} == {
        1: "other exception", 2: "out of memory", 3: "crash or hang", 5: "crash or hang", 6: "different result",
        7: "typed error without the file's name",
    }  # fmt: skip
    assert report.outcomes["equal"] == 2
    assert report.outcomes["typed error"] == 1
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


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 40 KiB of its own, and how to make it larger; only root may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(folder)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder, lambda: subprocess.run(["mount", "-o", "remount,size=4m", str(folder)], check=True)
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_no_space_left_is_told_and_once_there_is_some_nothing_finished_is_lost(small_disk):
    """The kernel's own ENOSPC, where `fill_and_resume` limits the size of files."""
    folder, enlarge = small_disk
    with pytest.raises(DataError, match=r"shard-0000\d.*No space left on device"):
        write_tiny_dataset(folder, SAMPLES, shards=SHARDS)
    assert any(folder.glob("*.idx")), "the disk is too small to finish a shard"
    enlarge()
    assert finish_and_compare(folder, SAMPLES) == ""
