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


@pytest.mark.parametrize(("limit", "expected"), [(0, 0), (1, 1), (8, 1), (9, 9), (160, 153), (161, 161), (10**6, 4097)])
def test_the_largest_clip_that_fits_is_found(limit, expected):
    asked = []
    assert bench_vae_gpu.largest(lambda frames: asked.append(frames) or frames <= limit) == expected
    assert all(frames % 8 == 1 for frames in asked)


@pytest.mark.gpu
def test_the_gpu_s_figures_exist():
    ours = our_model(CONFIG, torch.bfloat16, "cuda")
    case = Case("encode", "chunked", (17, 64, 64), torch.bfloat16, "cuda")
    seconds, peak, result = bench_vae_gpu.measure(Ours(ours, case))
    assert seconds > 0 and peak >= result.nbytes
    assert bench_vae_gpu.fits(ours, case)
