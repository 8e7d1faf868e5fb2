"""Charts of a run as inline SVG, drawn with matplotlib."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, SOFT, LINE = "#1f2933", "#66727f", "#e3e7ec"
BLUE, ORANGE, GREEN, PURPLE = "#2457a6", "#d9730d", "#2e8b57", "#7b4fa3"
COLORS = (BLUE, ORANGE, GREEN, PURPLE)
WIDTH_INCHES = 10.0
SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "megacogvx",  # the same chart has the same bytes
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": LINE,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "text.color": INK,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Line:
    """One curve: name, y values (None where there is none), colour."""

    name: str
    values: Sequence[float | None]
    color: str = BLUE


def lines(
    steps: Sequence[int],
    curves: Sequence[Line],
    ylabel: str,
    *,
    marks: Sequence[tuple[int, str]] = (),
    logarithmic: bool = False,
    smooth: bool = True,
    height: float = 3.2,
) -> str:
    """Draw curves over steps; where there are many points, a pale line of them under their moving mean.

    Args:
        steps: x values.
        curves: what is drawn.
        ylabel: what y is, with its unit.
        marks: (step, text) of vertical lines, such as a change of layout.
        logarithmic: whether y is.
        smooth: draw the moving mean as well.
        height: inches.
    """
    with matplotlib.rc_context(SETTINGS):
        chart, axes = _axes(height)
        for curve in curves:
            _curve(axes, np.asarray(steps), _array(curve.values), curve, smooth)
        for step, label in marks:
            if step != steps[0]:
                axes.axvline(step, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(label, (step, 1.0), xycoords=("data", "axes fraction"), xytext=(5, -2), color=SOFT,
                          textcoords="offset points", va="top", fontsize=10)  # fmt: skip
        if logarithmic:
            axes.set_yscale("log")
        if len(curves) > 1:
            axes.legend(loc="upper right", ncols=len(curves), bbox_to_anchor=(1.0, 1.14))
        axes.margins(x=0.01)
        axes.set_xlabel("step")
        axes.set_ylabel(ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        return _svg(chart, ylabel)


@dataclass(frozen=True)
class Band:
    """Repetitions of one curve: name, values `[repetition, step]`, colour; `each`: all of them, not mean and range."""

    name: str
    values: np.ndarray
    color: str = BLUE
    each: bool = False


def panels(parts: Sequence[tuple[str, Sequence[Band]]], title: str, ylabel: str, height: float = 6.4) -> str:
    """Draw panels two a row; in each the mean of every band's repetitions, within the range of them.

    Args:
        parts: title and bands of each panel.
        title: of the picture.
        ylabel: what y is, with its unit.
        height: inches.
    """
    with matplotlib.rc_context(SETTINGS):
        chart = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
        chart.suptitle(title, fontsize=12)
        for axes, (name, bands) in zip(chart.subplots(-(-len(parts) // 2), 2).flat, parts, strict=False):
            for band in bands:
                _band(axes, band)
            axes.set_title(name, loc="left", fontsize=11)
            axes.legend(loc="upper right")
            # the first fall is alike and so steep that it would leave no room for the rest
            axes.set_ylim(top=max(float(band.values[:, band.values.shape[1] // 8 :].max()) for band in bands))
            axes.margins(x=0.01)
            axes.set_xlabel("step")
            axes.set_ylabel(ylabel)
        return _svg(chart, title)


def intervals(
    steps: Sequence[int], losses: Sequence[Sequence[float | None]], num_train_timesteps: int, height: float = 3.6
) -> str:
    """Draw the loss by timestep interval over time, as a map; blank where no sample fell into an interval.

    Args:
        steps: x values.
        losses: `[step][interval]`.
        num_train_timesteps: T, for the labels of the intervals.
        height: inches.
    """
    with matplotlib.rc_context(SETTINGS):
        chart, axes = _axes(height)
        values = np.stack([_array(row) for row in losses])  # [step, interval]
        parts = np.array_split(np.arange(len(steps)), min(len(steps), 60))
        means = np.stack([_mean(values[part]) for part in parts], axis=1)
        edges = [steps[part[0]] for part in parts] + [steps[-1] + 1]
        bounds = np.linspace(0, num_train_timesteps, values.shape[1] + 1)
        axes.grid(visible=False)
        picture = axes.pcolormesh(edges, bounds, means, cmap="viridis_r", edgecolor="face", linewidth=0.4)
        axes.set_yticks(bounds[::2])
        axes.set_xlabel("step")
        axes.set_ylabel("timestep")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        bar = chart.colorbar(picture, ax=axes, pad=0.015, aspect=18)
        bar.outline.set_visible(False)
        bar.set_label("loss")
        return _svg(chart, "loss by timestep interval over the steps")


def interval_bars(losses: Sequence[float | None], num_train_timesteps: int, height: float = 2.6) -> str:
    """Draw the mean loss of each timestep interval as bars."""
    with matplotlib.rc_context(SETTINGS):
        chart, axes = _axes(height)
        bounds = np.linspace(0, num_train_timesteps, len(losses) + 1)
        width = bounds[1] - bounds[0]
        axes.bar(bounds[:-1] + width / 2, np.nan_to_num(_array(losses)), width=0.86 * width, color=BLUE)
        axes.set_xticks(bounds)
        axes.set_xlabel("timestep (0: nearly clean, right: pure noise)")
        axes.set_ylabel("loss")
        axes.grid(visible=False, axis="x")
        return _svg(chart, "mean loss by timestep interval")


def _axes(height: float) -> tuple[Figure, Axes]:
    chart = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
    return chart, chart.add_subplot()


def _band(axes: Axes, band: Band) -> None:
    steps = np.arange(band.values.shape[1])
    if band.each:
        for place, values in enumerate(band.values):
            axes.plot(steps, values, color=band.color, linewidth=1.0, alpha=0.8, label=None if place else band.name)
        return
    axes.fill_between(steps, band.values.min(0), band.values.max(0), color=band.color, alpha=0.15, linewidth=0)
    axes.plot(steps, band.values.mean(0), color=band.color, linewidth=1.6, label=band.name)


def _curve(axes: Axes, steps: np.ndarray, values: np.ndarray, curve: Line, smooth: bool) -> None:
    known = np.isfinite(values)
    steps, values = steps[known], values[known]
    window = len(values) // 25
    if not smooth or window < 2:
        axes.plot(steps, values, color=curve.color, linewidth=1.8, marker="o" if len(values) < 30 else None,
                  markersize=4, label=curve.name)  # fmt: skip
        return
    axes.plot(steps, values, color=curve.color, linewidth=0.8, alpha=0.3)
    axes.plot(steps, moving_mean(values, window), color=curve.color, linewidth=2.0, label=curve.name)


def moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean of each value and the `window` ones on either side, fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    low, high = np.maximum(places - window, 0), np.minimum(places + window + 1, len(values))
    return np.asarray((sums[high] - sums[low]) / (high - low))


def _array(values: Sequence[float | None]) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in values], dtype=float)


def _mean(values: np.ndarray) -> np.ndarray:
    """Return the mean over the first axis, of the values that are there; nan where there is none."""
    known = np.isfinite(values)
    return np.where(known.any(0), np.where(known, values, 0.0).sum(0) / np.maximum(known.sum(0), 1), math.nan)


def _svg(chart: Figure, label: str) -> str:
    buffer = io.StringIO()
    chart.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    name = label.replace("&", "and").replace('"', "")
    return drawing.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)
