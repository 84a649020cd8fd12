"""The picture of morphology: each structure's volumes in both sets, and how structures go together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from neuromf.reporting.figures import save

_DPI = 100
_REAL, _GENERATED = "#222222", "#d1495b"
_ROW_INCHES = 0.3


def anatomy_figure(
    path: str | Path, names: Sequence[str], generated: ArrayLike, real: ArrayLike, *, agreement: str = ""
) -> Path:
    """Draw the volumes of each structure, and the correlations between structures of one set against the other's.

    Args:
        path: of the picture, PNG or PDF.
        names: of the S structures.
        generated: (N, S) in ml.
        real: (M, S).
        agreement: said above the correlations.
    """
    a, b = np.asarray(generated, dtype=float), np.asarray(real, dtype=float)
    height = max(3.6, 1.2 + _ROW_INCHES * len(names))
    figure = Figure(figsize=(11.5, height), dpi=_DPI)
    bottom, top = 0.55 / height, 1 - 0.45 / height
    _volumes(figure.add_axes((0.19, bottom, 0.38, top - bottom)), names, a, b)
    _correlations(figure.add_axes((0.65, bottom, 0.33, top - bottom)), a, b, agreement)
    return save(figure, path)


def _volumes(axes: Axes, names: Sequence[str], generated: NDArray[np.float64], real: NDArray[np.float64]) -> None:
    """In units of the real mean: the median, the quartiles, and the 5th to the 95th percentile."""
    mean = np.where(real.mean(0) > 0, real.mean(0), 1.0)
    rows = np.arange(len(names))
    for shift, label, values, colour in ((-0.16, "real", real, _REAL), (0.16, "generated", generated, _GENERATED)):
        p5, p25, p50, p75, p95 = np.percentile(values / mean, [5, 25, 50, 75, 95], axis=0)
        axes.hlines(rows + shift, p5, p95, color=colour, lw=1)
        axes.hlines(rows + shift, p25, p75, color=colour, lw=5, alpha=0.45)
        axes.plot(p50, rows + shift, "o", ms=3.2, color=colour, label=f"{label} (N = {len(values)})")
    axes.axvline(1, color="#888888", lw=0.8, ls=":", zorder=0)
    labels = [f"{name}, {value:.3g} ml" for name, value in zip(names, real.mean(0), strict=True)]
    axes.set_yticks(range(len(names)), labels, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("volume / mean of the real set (given beside the name)", fontsize=9)
    _dress(axes, "Volumes: median, quartiles, 5th to 95th percentile")
    axes.legend(fontsize=8, framealpha=0.85, edgecolor="none", loc="best")


def _correlations(axes: Axes, generated: NDArray[np.float64], real: NDArray[np.float64], agreement: str) -> None:
    kept = (np.ptp(generated, axis=0) > 0) & (np.ptp(real, axis=0) > 0)
    if kept.sum() > 1 and min(len(generated), len(real)) > 2:
        upper = np.triu_indices(int(kept.sum()), 1)
        x, y = (np.atleast_2d(np.corrcoef(values[:, kept], rowvar=False))[upper] for values in (real, generated))
        axes.scatter(x, y, s=12, lw=0, alpha=0.6, color=_GENERATED)
    axes.plot([-1, 1], [-1, 1], color="#888888", lw=0.8, ls=":", zorder=0)
    axes.set_xlim(-1.05, 1.05)
    axes.set_ylim(-1.05, 1.05)
    axes.set_xlabel("correlation of two structures, real", fontsize=9)
    axes.set_ylabel("the same, generated", fontsize=9)
    _dress(axes, agreement or "Inter-structure correlations")


def _dress(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
