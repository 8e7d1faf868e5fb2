#!/usr/bin/env python
"""Measure what explicit uniform sampling does: the variance that the choice of timesteps adds to a step's loss.

For each way to draw them, against independent draws: the variance over steps of the weighted mean of a loss curve over
timesteps ("between timesteps"), and the chi-square of the marginal, which has to be uniform.

python tools/bench_timesteps.py --packs 8 64 512          (about half a minute)
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist, pvariance

from rich.console import Console
from rich.table import Table

from megacogvx.diffusion.config import DiffusionConfig, TimestepSampling
from megacogvx.diffusion.timesteps import step_timesteps
from megacogvx.draws import permutation
from megacogvx.log import progress

TIMESTEPS = 1000
BINS = 50
LEVEL = 0.001  # chance that a uniform marginal is taken for another
Weights = list[list[float]]  # [pack][sample]
MODES: tuple[TimestepSampling, ...] = ("independent", "uniform_pack", "uniform_sample")


def equal_samples(packs: int, step: int) -> Weights:
    """Return packs of 3 to 8 samples that weigh the same: the mean over samples."""
    return [[1.0] * (3 + (place + step) % 6) for place in range(packs)]


def tokens(packs: int, step: int) -> Weights:
    """Return packs of 3 to 8 samples that weigh 1 to 10: the mean over tokens, of packs of unequal fill."""
    return [
        [1.0 + (step * 31 + place * 17 + sample * 7) % 10 for sample in range(3 + (place + step) % 6)]
        for place in range(packs)
    ]


def full_packs(packs: int, step: int) -> Weights:
    """Return packs that weigh the same, their samples not: the mean over tokens of full packs."""
    kinds = ([30.0], [10.0, 20.0], [9.0, 9.0, 12.0], [3.0, 7.0, 5.0, 15.0])
    return [list(kinds[(place + step) % 4]) for place in range(packs)]


CASES: dict[str, Callable[[int, int], Weights]] = {
    "mean over samples": equal_samples, "mean over tokens": tokens, "mean over tokens, full packs": full_packs,
}  # fmt: skip
# Where a mode's strata are as wide as what they weigh, and so the bound of 1% holds.
MATCHES = {("uniform_sample", case) for case in CASES} | {("uniform_pack", "mean over tokens, full packs")}


@dataclass(frozen=True)
class Result:
    """What one mode does.

    Attributes:
        variance: of the step's mean loss, over steps.
        chi_square: of the timesteps of all samples, over `BINS` bins.
    """

    variance: float
    chi_square: float


def loss_at(timestep: int) -> float:
    """Return a loss of the usual form: high at little noise, and not symmetric."""
    return 0.15 + 0.8 * math.exp(-timestep / 150.0) + 0.1 * (timestep / TIMESTEPS) ** 4


def draw(config: DiffusionConfig, seed: int, step: int, weights: Weights) -> list[list[int]]:
    """Draw the timesteps of packs that the plan has put in random order; return them in the order of `weights`."""
    order = permutation(len(weights), seed, "pack order", step)
    drawn = step_timesteps(config, seed, step, [weights[pack] for pack in order])
    return [timesteps for _, timesteps in sorted(zip(order, drawn, strict=True))]


def measure(mode: TimestepSampling, weights_of: Callable[[int], Weights], steps: int, seed: int = 5) -> Result:
    """Draw `steps` steps by `mode`."""
    config = DiffusionConfig(timestep_sampling=mode, num_train_timesteps=TIMESTEPS)
    means, marginal = [], [0] * BINS
    for step in range(steps):
        weights = weights_of(step)
        drawn = draw(config, seed, step, weights)
        pairs = [(w, t) for pack, ts in zip(weights, drawn, strict=True) for w, t in zip(pack, ts, strict=True)]
        means.append(sum(w * loss_at(t) for w, t in pairs) / sum(w for w, _ in pairs))
        # One sample a step: those of one step are not independent, which chi-square asks for.
        marginal[pairs[step % len(pairs)][1] * BINS // TIMESTEPS] += 1
    return Result(pvariance(means), sum((count - steps / BINS) ** 2 / (steps / BINS) for count in marginal))


def chi_square_limit(degrees: int, level: float = LEVEL) -> float:
    """Return the chi-square that is exceeded by chance with probability `level` (Wilson and Hilferty 1931)."""
    z, share = NormalDist().inv_cdf(1 - level), 2 / (9 * degrees)
    return degrees * (1 - share + z * share**0.5) ** 3


def compare(packs: int, case: str, steps: int) -> dict[TimestepSampling, Result]:
    """Measure all modes on one case."""
    return {mode: measure(mode, lambda step: CASES[case](packs, step), steps) for mode in MODES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=int, nargs="+", default=[64], help="packs of a step (default 64)")
    parser.add_argument("--steps", type=int, default=1000, help="steps (default 1000)")
    arguments = parser.parse_args()
    table = Table(title=f"{arguments.steps} steps; chi-square below {chi_square_limit(BINS - 1):.1f} is uniform")
    for name in ("packs", "loss", "mode", "variance / independent", "bound", "chi-square"):
        table.add_column(name, justify="right" if name not in ("loss", "mode") else "left")
    for packs in arguments.packs:
        for case in progress(list(CASES), f"{packs} packs"):
            results = compare(packs, case, arguments.steps)
            for mode, result in results.items():
                ratio = result.variance / results["independent"].variance
                bound = "0.01" if packs >= 64 and (mode, case) in MATCHES else ""
                table.add_row(str(packs), case, mode, f"{ratio:.5f}", bound, f"{result.chi_square:.1f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
