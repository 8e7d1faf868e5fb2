"""What `tools/bench_vae.py` compares is the same computation, and its figures are what they say."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))

import bench_vae
import bench_vae_gpu
from bench_vae_sides import CODINGS, PARTS, Case, Ours, Theirs, diffusers_model, our_model

from megacogvx.models.vae import VAEConfig
from megacogvx.testing.peak_memory import peak_bytes
from megacogvx.testing.tolerance import assert_close

CONFIG = VAEConfig(block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2, latent_channels=2)


@pytest.fixture(scope="module")
def models():
    ours = our_model(CONFIG, torch.float32, "cpu")
    return ours, diffusers_model(ours)


@pytest.mark.parametrize("part", PARTS)
def test_both_sides_compute_the_same_in_every_mode(models, part):
    results = {}
    for mode in ("whole", "chunked"):
        ours = Ours(models[0], Case(part, mode, (17, 16, 24)))
        results[mode] = ours()
        assert_close(results[mode], Theirs(models[1], ours.case, ours.x)(), 1e-5, mode)
    assert not torch.allclose(results["whole"], results["chunked"], rtol=1e-3)
    assert CODINGS["tiled"].tile is not None


def test_peak_bytes_count_what_lives_at_a_time():
    def run():
        a = torch.empty(1000)
        b = a + 1
        del a
        return b.repeat(3)  # b and its copies: 4 + 12 kB

    assert 16_000 <= peak_bytes(run) <= 16_500


def test_sizes_are_read():
    assert bench_vae.size_of("49x128x96") == (49, 128, 96)


def test_the_longest_clip_is_predicted_by_a_line():
    line = lambda frames: 100 + 20 * frames  # noqa: E731
    for free, expected in ((100 + 20 * 161, 161), (100 + 20 * 161 - 1, 153), (150, 1), (10**9, 4097)):
        assert bench_vae_gpu.on_line((9, 25), (line(9), line(25)), free) == expected
    assert bench_vae_gpu.on_line((9, 25), (100, 100), 200) == bench_vae_gpu.MOST_FRAMES


@pytest.mark.parametrize(
    ("limit", "predicted", "expected"),
    [(0, 1, 0), (1, 9, 1), (161, 161, 161), (170, 161, 169), (150, 161, 145), (5000, 4097, 4097), (1000, 801, 993)],
)
def test_the_longest_clip_that_fits_is_found_near_the_prediction(limit, predicted, expected):
    asked = []
    assert bench_vae_gpu.largest(lambda frames: asked.append(frames) or frames <= limit, predicted) == expected
    assert all(frames % 8 == 1 for frames in asked)


class _Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 500.0


def test_a_side_that_cannot_be_run_is_named_and_the_other_measured(models, monkeypatch, capsys):
    """Clocks and counters are a GPU's; here they are played."""

    def fails(*arguments):
        raise RuntimeError("output tensors with less than INT_MAX elements only\nmore")

    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30)
    case = Case("encode", "whole", (9, 16, 16))
    bench_vae_gpu.compare(case, *models, rounds=1)
    assert "1.00x as fast, 1.00x the memory, relative error" in capsys.readouterr().out
    monkeypatch.setattr(Theirs, "__call__", fails)
    bench_vae_gpu.compare(case, *models, rounds=1)
    _, theirs, ours = capsys.readouterr().out.splitlines()
    assert theirs.split(maxsplit=1) == [
        "diffusers",
        "RuntimeError: output tensors with less than INT_MAX elements only",
    ]
    assert ours.split()[:5] == ["megacogvx", "0.500", "s", "18.0", "frames/s"]
    monkeypatch.setattr(bench_vae_gpu, "longest", fails)
    assert bench_vae_gpu.said_of_longest(models[0], case).startswith("RuntimeError: output tensors")


@pytest.mark.gpu
def test_the_gpu_s_figures_exist():
    ours = our_model(CONFIG, torch.bfloat16, "cuda")
    case = Case("encode", "chunked", (17, 64, 64), torch.bfloat16, "cuda")
    seconds, peak, result = bench_vae_gpu.measure(Ours(ours, case), 2)
    assert seconds > 0 and peak >= result.nbytes
    assert "frames" in bench_vae_gpu.longest(ours, case)
