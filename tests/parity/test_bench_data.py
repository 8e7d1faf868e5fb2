"""What `tools/bench_data.py` compares is the same copy, whichever format it comes from, as a ratio to memcpy."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))

import bench_data
import bench_data_peers

SIZES = [(1, 16, 60), (1, 16, 70), (4, 16, 80), (4, 16, 100), (13, 16, 90), (13, 16, 100)]  # 0.06 to 1.3 MB
HEAVY = {"megatron"}  # takes seconds to import


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_data, "sizes", lambda: SIZES)
    bench_data.write(tmp_path / "dataset", SIZES)
    return tmp_path / "dataset"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in HEAVY)) for name in bench_data_peers.PEERS]
)
def test_a_peer_copies_what_this_format_holds(folder, name):
    module, open_peer = bench_data_peers.PEERS[name]
    if not bench_data._is_installed(module):
        pytest.skip(f"{module} lives in an environment of its own")
    bench_data.check(folder, {name: open_peer(folder)}, len(SIZES))


def test_ratios_are_to_memcpy_and_wrong_bytes_are_no_result(folder, monkeypatch):
    own = [name for name in bench_data.METHODS if name not in bench_data_peers.PEERS]
    found = bench_data.ratios(folder, own, 1)
    assert own[0] == "memcpy" and list(found) == own
    assert [ratio for _, ratio in found["memcpy"]] == [1.0] * len(bench_data.CLASSES)
    assert all(len(cells) == len(bench_data.CLASSES) and min(map(min, cells)) > 0 for cells in found.values())
    read = bench_data.METHODS["ours"][1](folder)

    def one_byte_off(number: int, buffer: np.ndarray) -> None:
        read(number, buffer)
        buffer[number] ^= 1

    monkeypatch.setitem(bench_data.METHODS, "ours", ("numpy", lambda _: one_byte_off))
    with pytest.raises(AssertionError, match="ours copied something else for sample 0"):
        bench_data.ratios(folder, own, 1)


def test_memory_index_and_opening_are_told(folder):
    assert bench_data.reader_memory(folder) < 64 << 20
    index = next(folder.glob("*.idx")).stat().st_size
    assert bench_data.index_bytes(folder) == f"index {index / 6:.1f} bytes a sample of 6.0 latent frames in the mean"
    told = bench_data.open_times(folder.parent / "many", 3000, per_shard=1000)
    assert told.startswith("3,000 samples opened in ") and len(list((folder.parent / "many").glob("*.idx"))) == 3
