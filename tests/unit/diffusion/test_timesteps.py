"""Explicit uniform sampling: the marginal, the variance that the strata remove, independence of layout."""

import importlib.util
import math
import sys
from pathlib import Path
from statistics import fmean, pvariance

import pytest

from megacogvx.diffusion.config import DiffusionConfig
from megacogvx.diffusion.timesteps import step_timesteps


def load_tool(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[3] / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


bench = load_tool("bench_timesteps")
MODES = ("uniform_sample", "uniform_pack", "independent")


def loss_at(t):
    """A loss curve over timesteps of the usual form: high at little noise, and not symmetric."""
    return 0.15 + 0.8 * math.exp(-t / 150.0) + 0.1 * (t / 1000.0) ** 4


def step_weights(step, packs=64):
    """Packs of 3 to 8 samples, as a planner makes them; the lengths vary by a factor of ten."""
    return [[1.0 + (step * 31 + p * 17 + s * 7) % 10 for s in range(3 + (p + step) % 6)] for p in range(packs)]


def step_loss_variance(mode, step_weights, steps=150):
    """Variance over steps of the weighted mean of `loss_at`: the part that the choice of timesteps adds."""
    config, losses = DiffusionConfig(timestep_sampling=mode), []
    for step in range(steps):
        weights = step_weights(step)
        drawn = bench.draw(config, 5, step, weights)
        pairs = [(w, loss_at(t)) for ws, ts in zip(weights, drawn, strict=True) for w, t in zip(ws, ts, strict=True)]
        losses.append(sum(w * m for w, m in pairs) / sum(w for w, _ in pairs))
    return pvariance(losses)


@pytest.mark.parametrize("mode", MODES)
def test_every_sample_has_a_uniform_marginal(mode):
    """Chi-square over 20 bins for one sample's timestep, whatever its weight; 43.8 is the 0.1% point of 19 degrees."""
    config = DiffusionConfig(timestep_sampling=mode)
    weights = [[1.0, 9.0], [3.0], [1.0, 1.0, 2.0]]
    bins = {(0, 0): [0] * 20, (0, 1): [0] * 20, (1, 0): [0] * 20, (2, 2): [0] * 20}
    for step in range(2000):
        drawn = bench.draw(config, 11, step, weights)
        for (pack, sample), counts in bins.items():
            counts[drawn[pack][sample] * 20 // 1000] += 1
    for counts in bins.values():
        assert sum((count - 100) ** 2 / 100 for count in counts) < 43.8, counts


@pytest.mark.parametrize("mode", MODES)
def test_every_timestep_can_be_drawn(mode):
    """Seven packs: 7 doesn't divide 1000, and whole-number intervals would lose the tail."""
    config, seen = DiffusionConfig(timestep_sampling=mode), set()
    for step in range(400):
        seen.update(t for pack in step_timesteps(config, 3, step, [[1.0] * 7] * 7) for t in pack)
    assert seen == set(range(1000))


def equal_weights(step):
    return [[1.0] * len(pack) for pack in step_weights(step)]


def full_packs(step):
    """Every pack holds 30 tokens, in samples of different length."""
    return [[[30.0], [10.0, 20.0], [9.0, 9.0, 12.0], [3.0, 7.0, 5.0, 15.0]][(p + step) % 4] for p in range(64)]


@pytest.mark.parametrize("weights", [equal_weights, step_weights], ids=["mean over samples", "mean over tokens"])
def test_strata_remove_the_variance_between_timesteps(weights):
    assert step_loss_variance("uniform_sample", weights) <= 0.01 * step_loss_variance("independent", weights)


def test_the_benchmark_finds_the_bound_where_weights_match_and_a_uniform_marginal():
    for case in bench.CASES:
        results = bench.compare(64, case, steps=100)
        for mode, result in results.items():
            if (mode, case) in bench.MATCHES:
                assert result.variance <= 0.01 * results["independent"].variance, (mode, case)
            assert result.chi_square < bench.chi_square_limit(bench.BINS - 1), (mode, case)
    assert bench.chi_square_limit(19) == pytest.approx(43.82, rel=0.005)  # from tables


def test_strata_of_the_paper_need_packs_of_equal_weight():
    """They serve a mean over the tokens of full packs, and little a mean over samples."""
    pack, independent = (step_loss_variance(mode, full_packs) for mode in ("uniform_pack", "independent"))
    assert pack < 0.05 * independent
    pack, independent = (step_loss_variance(mode, equal_weights) for mode in ("uniform_pack", "independent"))
    assert 0.2 * independent < pack < independent


def test_a_pack_draws_from_the_interval_of_its_place():
    config = DiffusionConfig(timestep_sampling="uniform_pack")
    drawn = step_timesteps(config, 2, 9, [[1.0] * 5] * 7)
    assert all(max(ts) - min(ts) <= 1000 / 7 for ts in drawn)
    assert [int(fmean(ts) * 7 / 1000) for ts in drawn] == list(range(7))


def test_timesteps_are_not_tied_to_place_or_weight():
    config, places, weights_seen, ts = DiffusionConfig(), [], [], []
    for step in range(600):
        weights = [[10.0], [5.0], [2.0], [1.0]]
        for place, pack in enumerate(step_timesteps(config, 1, step, weights)):
            places.append(place), weights_seen.append(weights[place][0]), ts.append(pack[0])
    assert abs(correlation(places, ts)) < 0.07 and abs(correlation(weights_seen, ts)) < 0.07


def test_neighbours_in_the_step_are_not_neighbours_in_time():
    """Two samples of one pack are as far apart as any two: on average a third of the range."""
    drawn = [step_timesteps(DiffusionConfig(), 4, step, [[1.0] * 4] * 16)[0] for step in range(300)]
    assert abs(fmean(abs(ts[0] - ts[1]) for ts in drawn) - 1000 / 3) < 60


def test_a_step_depends_on_seed_and_step_alone():
    config, weights = DiffusionConfig(), step_weights(0, packs=4)
    first = step_timesteps(config, 7, 100, weights)
    step_timesteps(config, 7, 3, weights)
    assert first == step_timesteps(config, 7, 100, weights)
    assert first != step_timesteps(config, 7, 101, weights)
    assert first != step_timesteps(config, 8, 100, weights)
    assert [len(pack) for pack in first] == [len(pack) for pack in weights]


def correlation(a, b):
    ma, mb = fmean(a), fmean(b)
    cov = fmean((x - ma) * (y - mb) for x, y in zip(a, b, strict=True))
    return cov / math.sqrt(pvariance(a) * pvariance(b))
