"""Which timestep each sample of a step is trained at: explicit uniform sampling (CogVideoX paper, section 3.2).

Independent draws leave gaps in [0, T) by chance, and the loss of a step moves with them. Strata over all samples of
the global step remove that part of the variance, provided that a sample's stratum is as wide as its weight in the
loss. Everything follows from (seed, step): every rank computes the same timesteps, whatever the layout, and a
restart repeats them.
"""

from __future__ import annotations

from itertools import accumulate

from megacogvx.diffusion.config import DiffusionConfig
from megacogvx.draws import permutation, uniform


def step_timesteps(config: DiffusionConfig, seed: int, step: int, weights: list[list[float]]) -> list[list[int]]:
    """Draw the timesteps of all samples of one global step, by `config.timestep_sampling`.

    - `uniform_sample`: the samples, in random order, share a circle; each takes an arc as wide as its weight in the
      loss, the first one starting at a random place, and draws uniformly within its arc. Any weights give each sample
      a uniform marginal over all T timesteps.
    - `uniform_pack`: the paper's, with packs in the place of ranks: N packs divide [0, T) into N equal intervals with
      exact fractional bounds, and all samples of a pack are drawn from the interval of its place in the step, which is
      its rank when each rank holds one pack. The plan puts the packs of a step in random order (`data/planner.py`), so
      that no sample is tied to one noise level.
    - `independent`: each sample on its own.

    Args:
        config: section `diffusion`.
        seed, step: the run's seed and the global step.
        weights: `[pack][sample]`, what a sample weighs in the loss (1 for the mean over samples, its video tokens for
            the mean over tokens); all packs of the step on all ranks, without the paddings.

    Returns:
        `[pack][sample]`, integers in [0, T).
    """
    flat = [weight for pack in weights for weight in pack]
    assert flat and all(weight > 0 for weight in flat), f"loss weights must be positive: {weights}"
    within = [uniform(seed, "timestep", step, place) for place in range(len(flat))]
    if config.timestep_sampling == "uniform_sample":
        places = _sample_strata(flat, within, seed, step)
    elif config.timestep_sampling == "uniform_pack":
        places = _pack_strata([len(pack) for pack in weights], within)
    else:
        places = within
    timesteps = iter(_to_timestep(place, config.num_train_timesteps) for place in places)
    return [[next(timesteps) for _ in pack] for pack in weights]


def _sample_strata(weights: list[float], within: list[float], seed: int, step: int) -> list[float]:
    order = permutation(len(weights), seed, "timestep order", step)
    offset = uniform(seed, "timestep offset", step)
    ends = list(accumulate(weights[sample] for sample in order))
    places = [0.0] * len(weights)
    for sample, end in zip(order, ends, strict=True):
        start = end - weights[sample]
        places[sample] = _fold((offset + (start + weights[sample] * within[sample]) / ends[-1]) % 1.0)
    return places


def _fold(place: float) -> float:
    """Map the circle [0, 1) onto [0, 1], there and back, which keeps the measure uniform.

    An arc across the seam of the circle so becomes one short interval, not the two ends of the range, where the losses
    differ most; with a plain modulo that one sample would bring back much of the variance that the strata remove.
    """
    return 1.0 - abs(2.0 * place - 1.0)


def _pack_strata(sizes: list[int], within: list[float]) -> list[float]:
    owner = [pack for pack, size in enumerate(sizes) for _ in range(size)]
    return [(pack + place) / len(sizes) for pack, place in zip(owner, within, strict=True)]


def _to_timestep(place: float, num_train_timesteps: int) -> int:
    return min(int(place * num_train_timesteps), num_train_timesteps - 1)  # place may round up to 1
