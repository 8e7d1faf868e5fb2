"""The loss curves of the paper's ablations, from runs of one's own: figure 10's four panels, and the order found.

A run folder holds `<name>/seed-<n>/metrics.jsonl`. All runs of a seed see the same samples, noise and (but for the last
panel) timesteps, so that differences within a seed are those of the models.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megacogvx.errors import DataError
from megacogvx.evaluation import charts
from megacogvx.evaluation.run_folder import read_metrics

SEEDS = (0, 1, 2)
Curves = dict[str, np.ndarray]  # name -> loss [seed, step]


@dataclass(frozen=True)
class Panel:
    """One panel of figure 10.

    Attributes:
        title: what is compared.
        sides: (name of the runs, label).
        claims: (better, worse) by the paper; of the fluctuation of the loss where `fluctuation`, else of its height.
        fluctuation: see `claims`.
    """

    title: str
    sides: tuple[tuple[str, str], ...]
    claims: tuple[tuple[str, str], ...]
    fluctuation: bool = False


PANELS = (
    Panel("(a) positions", (("published", "3D-RoPE"), ("sinusoidal", "sinusoidal")), (("published", "sinusoidal"),)),
    Panel("(b) attention", (("published", "3D full"), ("2d_1d", "2D + 1D")), (("published", "2d_1d"),)),
    Panel(
        "(c) modalities",
        (
            ("published", "expert AdaLN"),
            ("shared_adaln", "without expert AdaLN"),
            ("mmdit1", "MMDiT, equal parameters"),
            ("mmdit2", "MMDiT, equal layers"),
        ),
        (("published", "shared_adaln"), ("published", "mmdit1")),
    ),
    Panel(
        "(d) timesteps",
        (("published", "explicit uniform"), ("independent", "independent")),
        (("published", "independent"),),
        fluctuation=True,
    ),
)
NAMES = tuple(dict.fromkeys(name for panel in PANELS for name, _ in panel.sides))


def finished(folder: Path, steps: int) -> bool:
    """Return whether the run in `folder` has a row for each of its steps."""
    return len(read_metrics(folder / "metrics.jsonl", [])) >= steps


def read_curves(folder: Path) -> Curves:
    """Read the losses of all runs, cut to the shortest run where lengths differ.

    Raises:
        DataError: a run is missing; it is named.
    """
    losses = {
        (name, seed): [row["loss"] for row in read_metrics(folder / name / f"seed-{seed}" / "metrics.jsonl", [])]
        for name in NAMES
        for seed in SEEDS
    }
    missing = [f"{name}/seed-{seed}" for (name, seed), values in losses.items() if not values]
    if missing:
        raise DataError(f"{folder} has no losses of {', '.join(missing)}; train them first")
    steps = min(map(len, losses.values()))
    return {name: np.array([losses[name, seed][:steps] for seed in SEEDS]) for name in NAMES}


def figure_10(curves: Curves) -> str:
    """Return the four panels as one SVG: the mean over the seeds, smoothed, in the band of them; in (d) each seed."""
    steps = next(iter(curves.values())).shape[1]
    window = max(1, steps // 25)
    panels = []
    for panel in PANELS:
        window_here = 0 if panel.fluctuation else window  # smoothing would hide what (d) is about
        bands = [
            charts.Band(
                label,
                np.stack([charts.moving_mean(row, window_here) for row in curves[name]]),
                color,
                panel.fluctuation,
            )
            for (name, label), color in zip(panel.sides, charts.COLORS, strict=False)
        ]
        panels.append((panel.title, bands))
    title = f"Loss curves of the ablations: our own short runs, a tiny model, {steps} steps, {len(SEEDS)} seeds each"
    return charts.panels(panels, title, "loss")


def order_report(curves: Curves) -> str:
    """Return what the paper says of each pair beside what these runs show, as lines of text."""
    lines = [f"{len(SEEDS)} seeds each; the order of figure 10 is reported, not asserted"]
    for panel in PANELS:
        measure, what = (fluctuation, "fluctuation") if panel.fluctuation else (final_loss, "loss")
        labels = dict(panel.sides)
        for better, worse in panel.claims:
            left, right = measure(curves[better]), measure(curves[worse])
            lines.append(
                f"{panel.title}: {what} of {labels[better]} {_range(left)}, of {labels[worse]} {_range(right)}; "
                f"the paper's order appears in {int((left < right).sum())} of {len(SEEDS)} seeds"
            )
    return "\n".join(lines) + "\n"


def final_loss(losses: np.ndarray) -> np.ndarray:
    """Return the mean loss of each seed over the last quarter of the steps, `[seed]`."""
    return np.asarray(losses[:, -max(1, losses.shape[1] // 4) :].mean(axis=1))


def fluctuation(losses: np.ndarray) -> np.ndarray:
    """Return how far the loss jumps from step to step in the second half, as the deviation of one step, `[seed]`."""
    half = losses[:, losses.shape[1] // 2 :]
    return np.asarray(np.diff(half, axis=1).std(axis=1) / np.sqrt(2))


def _range(values: np.ndarray) -> str:
    return f"{values.mean():.4f} ({values.min():.4f} to {values.max():.4f})"
