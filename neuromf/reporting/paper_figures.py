"""Figures 4 to 6 of a paper from collected numbers: each is drawn once and written as PNG and as PDF."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from numpy.typing import ArrayLike

from neuromf.reporting.figures import colour, dress, log_axis, save

_DPI = 200


class Group(NamedTuple):
    """Runs of one level: each run's value, and their mean with its interval (None where there is none)."""

    name: str
    values: Sequence[float]
    mean: float | None
    low: float | None = None
    high: float | None = None


def write_both(figure: Figure, stem: str | Path) -> list[Path]:
    """The figure as `<stem>.png` and `<stem>.pdf`."""
    return [save(figure, Path(f"{stem}{suffix}")) for suffix in (".png", ".pdf")]


def by_evaluations(models: Mapping[str, Mapping[int, Sequence[float]]], metric: str, stem: str | Path) -> list[Path]:
    """Figure 4: quality against the number of network evaluations, a line for each model, a dot for each run.

    Args:
        models: name -> number of evaluations -> values of its runs.
        metric: what the values are.
    """
    figure, axes = _panel(5.2, 3.6)
    counts = sorted({nfe for values in models.values() for nfe in values})
    for n, (name, values) in enumerate(models.items()):
        axes.plot(list(values), [float(np.mean(v)) for v in values.values()], color=colour(n), lw=1.5, label=name)
        for nfe, each in values.items():
            axes.scatter([nfe] * len(each), each, s=16, color=colour(n), lw=0)
    axes.set_xscale("log")
    axes.set_xticks(counts, [str(nfe) for nfe in counts])
    axes.xaxis.set_minor_locator(NullLocator())
    spread = _spread([v for values in models.values() for each in values.values() for v in each])
    if spread > 5:
        log_axis(axes, spread)
    dress(axes, "", "network evaluations per sample", metric, legend=True)
    return write_both(figure, stem)


def sweep(groups: Sequence[Group], metric: str, setting: str, stem: str | Path) -> list[Path]:
    """Figure 5: a metric over the values of a setting: runs as dots, means with their intervals.

    Args:
        groups: named by their value; places go by the number, or by order where a name is none.
    """
    figure, axes = _panel(5.2, 3.6)
    places = _places([group.name for group in groups])
    _groups(axes, groups, places)
    axes.set_xticks(places, [group.name for group in groups])
    dress(axes, "", setting, metric, legend=True)
    return write_both(figure, stem)


def two_ways(
    groups: Sequence[Group],
    curves: Mapping[str, Sequence[tuple[ArrayLike, ArrayLike]]],
    metric: str,
    setting: str,
    stem: str | Path,
) -> list[Path]:
    """Figure 6: the metric of each way, and beside it how the runs of each got there.

    Args:
        curves: group name -> (epochs, raw validation loss) of its runs.
    """
    figure = Figure(figsize=(9.2, 3.6), dpi=_DPI)
    left, right = figure.add_axes((0.07, 0.15, 0.32, 0.76)), figure.add_axes((0.48, 0.15, 0.5, 0.76))
    _groups(left, groups, list(range(len(groups))))
    left.set_xticks(range(len(groups)), [group.name for group in groups])
    left.set_xlim(-0.6, len(groups) - 0.4)
    dress(left, "samples", setting, metric, legend=True)
    for n, (name, runs) in enumerate(curves.items()):
        for number, (x, y) in enumerate(runs):
            right.plot(np.asarray(x), np.asarray(y), color=colour(n), lw=1.1, label=name if number == 0 else None)
    spread = _spread([value for runs in curves.values() for _, y in runs for value in np.asarray(y)])
    if spread > 5:
        log_axis(right, spread)
    right.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    dress(right, "training", "epoch", "raw validation loss", legend=True)
    return write_both(figure, stem)


def _panel(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=_DPI)
    return figure, figure.add_axes((0.13, 0.14, 0.84, 0.82))


def _groups(axes: Axes, groups: Sequence[Group], places: Sequence[float]) -> None:
    """Runs as dots, and to their right the means with their intervals."""
    aside = 0.02 * ((max(places) - min(places)) or 1)
    for number, (place, group) in enumerate(zip(places, groups, strict=True)):
        label = "run" if number == 0 else None
        axes.scatter(
            [place - aside] * len(group.values), group.values, s=16, color=colour(2), alpha=0.7, lw=0, label=label
        )
        if group.mean is None:
            continue
        ends = None
        if group.low is not None and group.high is not None:
            ends = [[group.mean - group.low], [group.high - group.mean]]
        name = ("mean, 95 % interval" if ends else "mean") if number == 0 else None
        axes.errorbar([place], [group.mean], yerr=ends, fmt="o", ms=4.5, color=colour(0), lw=1.2, capsize=3, label=name)


def _places(names: Sequence[str]) -> list[float]:
    try:
        return [float(name) for name in names]
    except ValueError:
        return [float(n) for n in range(len(names))]


def _spread(values: Sequence[float]) -> float:
    """The largest over the smallest value; 0 where not all are positive."""
    return max(values) / min(values) if values and min(values) > 0 else 0.0
