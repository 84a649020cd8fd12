"""Figure 2: what a toy run learned: its loss, its samples on the torus, and the distribution of their angles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from mpl_toolkits.mplot3d import Axes3D
from numpy.typing import ArrayLike, NDArray

from neuromf.reporting.figures import save

Curve = tuple[ArrayLike, ArrayLike]

_DPI = 110
_COLOURS = ("#222222", "#d1495b", "#2e86ab", "#edae49", "#66a182", "#8d6a9f")
_MAJOR, _MINOR = 3.0, 1.0
_BINS = 24


def torus_figure(
    path: str | Path,
    *,
    losses: Mapping[str, Curve],
    angles: ArrayLike,
    distance: ArrayLike,
    points: ArrayLike,
    truth: ArrayLike,
    heading: str = "",
) -> Path:
    """Draw four panels side by side: losses, samples on the torus, samples as they are, histograms of both angles.

    Args:
        path: of the PNG; a PDF is written beside it.
        losses: series name -> (epochs, raw loss).
        angles: (N, 2) of the one-step samples, radians.
        distance: (N,) of the same samples to the manifold, relative to its spread.
        points: the same samples: (N, 4, 1, 1, 1) is drawn as two circles, (M, C, I, J, K) as slices.
        truth: points of the manifold, the same way: for volumes those nearest to `points`.
        heading: over the whole figure.
    """
    angles, distance = np.asarray(angles, dtype=float), np.asarray(distance, dtype=float)
    points, truth = np.asarray(points, dtype=float), np.asarray(truth, dtype=float)
    figure = Figure(figsize=(17, 4.4), dpi=_DPI)
    grid = figure.add_gridspec(1, 4, left=0.045, right=0.985, bottom=0.13, top=0.82, wspace=0.2)
    _losses(figure.add_subplot(grid[0]), losses)
    _on_torus(figure, grid[1], angles, distance)
    draw = _circles if points.shape[2:] == (1, 1, 1) else _slices
    draw(figure, grid[2], points, truth)
    _histograms(figure, grid[3], angles)
    if heading:
        figure.text(0.012, 0.95, heading, fontsize=12, weight="bold")
    path = Path(path)
    save(figure, path.with_suffix(".pdf"))
    return save(figure, path)


def _losses(axes: Axes, losses: Mapping[str, Curve]) -> None:
    for n, (name, (epochs, values)) in enumerate(losses.items()):
        axes.plot(np.asarray(epochs), np.asarray(values), lw=1.3, color=_COLOURS[n % len(_COLOURS)], label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("epoch", fontsize=9)
    _title(axes, "raw loss")
    axes.grid(alpha=0.25, lw=0.6, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)


def _on_torus(figure: Figure, where: SubplotSpec, angles: NDArray[np.float64], distance: NDArray[np.float64]) -> None:
    """Angles as places on a ring-shaped torus, coloured by the distance to the manifold."""
    axes: Axes3D = figure.add_subplot(where, projection="3d")
    u, v = np.meshgrid(np.linspace(0, 2 * math.pi, 49), np.linspace(0, 2 * math.pi, 25))
    axes.plot_wireframe(*_place(u, v), color="#999999", lw=0.3, rcount=13, ccount=33)
    dots = axes.scatter(*_place(angles[:, 0], angles[:, 1]), c=distance, s=4, cmap="viridis", vmin=0, depthshade=False)
    axes.set_box_aspect((1, 1, 0.4), zoom=1.5)
    axes.view_init(elev=48, azim=-60)
    axes.set_axis_off()
    axes.set_title(f"{len(angles):,} one-step samples", fontsize=10, loc="left")
    bar = figure.colorbar(dots, ax=axes, shrink=0.55, pad=0.02)
    bar.set_label("distance to the manifold", fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _place(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    ring = _MAJOR + _MINOR * np.cos(b)
    return ring * np.cos(a), ring * np.sin(a), _MINOR * np.sin(b)


def _circles(figure: Figure, where: SubplotSpec, points: NDArray[np.float64], truth: NDArray[np.float64]) -> None:
    """The two coordinate pairs, each of which should fill a circle of radius 1/sqrt 2."""
    turn = np.linspace(0, 2 * math.pi, 200)
    axes = figure.add_subplot(where)
    flat = points.reshape(len(points), 4)
    for n, centre in enumerate((0.0, 1.75)):
        axes.scatter(flat[:, 2 * n] + centre, flat[:, 2 * n + 1], s=3, lw=0, alpha=0.6, color=_COLOURS[1 + n])
        axes.plot(centre + math.sqrt(0.5) * np.cos(turn), math.sqrt(0.5) * np.sin(turn), color="#222222", lw=0.8)
        axes.text(centre, 0, f"$x_{2 * n + 1}, x_{2 * n + 2}$", ha="center", va="center", fontsize=10)
    axes.set_aspect("equal")
    axes.set_axis_off()
    _title(axes, "coordinate pairs, and the circles they belong on")


def _slices(figure: Figure, where: SubplotSpec, points: NDArray[np.float64], truth: NDArray[np.float64]) -> None:
    """Middle slices of a few samples, every channel, above the manifold's points at the same angles."""
    shown = min(len(points), 4)
    low, high = 0.0, float(truth[:shown].max())
    cells = where.subgridspec(2, 1, hspace=0.25)
    for row, (name, volumes) in enumerate((("generated", points), ("the manifold's, at the same angles", truth))):
        axes = figure.add_subplot(cells[row])
        tiles = [np.concatenate([np.pad(c[:, :, c.shape[2] // 2], 1) for c in v], axis=1) for v in volumes[:shown]]
        axes.imshow(_stack(tiles), cmap="gray", vmin=low, vmax=high, aspect="equal", interpolation="nearest")
        axes.set_axis_off()
        _title(axes, name)


def _stack(tiles: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Tiles two to a row."""
    rows = [np.concatenate(tiles[n : n + 2], axis=1) for n in range(0, len(tiles) - len(tiles) % 2, 2)]
    return np.concatenate(rows or list(tiles[:1]), axis=0)


def _histograms(figure: Figure, where: SubplotSpec, angles: NDArray[np.float64]) -> None:
    """Counts of each angle, and where 95 % of the counts of uniform angles lie."""
    cells = where.subgridspec(2, 1, hspace=0.35)
    expected = len(angles) / _BINS
    band = 1.96 * math.sqrt(expected * (1 - 1 / _BINS))
    for n, name in enumerate("ab"):
        axes = figure.add_subplot(cells[n])
        wrapped = np.mod(angles[:, n], 2 * math.pi)
        axes.hist(wrapped, bins=_BINS, range=(0, 2 * math.pi), color=_COLOURS[1 + n], alpha=0.8)
        axes.axhspan(expected - band, expected + band, color="#222222", alpha=0.15, lw=0)
        axes.axhline(expected, color="#222222", lw=0.8)
        axes.set_xlim(0, 2 * math.pi)
        axes.set_xticks([0, math.pi, 2 * math.pi], ["0", "π", "2π"])
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        _title(axes, f"angle {name} (grey: 95 % of uniform counts)" if n == 0 else f"angle {name}")


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=10, loc="left")
