"""The picture of a diagnosis: every figure of a run over one axis of epochs, with the levels it is judged by."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from neuromf.files import atomic_path

Curve = tuple[ArrayLike, ArrayLike]

_DPI = 100
_COLUMNS = 3
_PANEL_INCHES = (4.6, 2.7)
_LINE_INCHES = 0.21
_WRAP = 150
_MARKED_BELOW = 12
_COLOURS = ("#222222", "#d1495b", "#2e86ab", "#edae49", "#66a182", "#8d6a9f", "#a0522d", "#7a7a7a")
_SEVERITY_COLOURS = {"problem": "#b3202c", "warning": "#a86a00", "note": "#555555"}


class Panel(NamedTuple):
    """Curves that share a scale: series name -> (epochs, values), and named levels to compare them with.

    The name of a curve that is alone may be empty.
    """

    title: str
    series: Mapping[str, Curve]
    log: bool = False
    levels: Mapping[str, float] = {}


def diagnosis_figure(
    path: str | Path, panels: Sequence[Panel], *, heading: str = "", findings: Sequence[tuple[str, str]] = ()
) -> Path:
    """Draw the panels three to a row over one axis of epochs, below the heading and the findings.

    Args:
        path: of the PNG.
        panels: at least one; values that are not finite, or have no place on a logarithmic scale, leave gaps.
        heading: one line.
        findings: (severity, title), drawn in this order.
    """
    if not panels:
        raise ValueError("no panel to draw")
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    text = [(severity, line) for severity, title in findings for line in _wrapped(f"{severity}: {title}", columns)]
    width, height = columns * _PANEL_INCHES[0], rows * _PANEL_INCHES[1]
    top = 0.45 + _LINE_INCHES * len(text)
    figure = Figure(figsize=(width, height + top), dpi=_DPI, layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0, 1, height / (height + top)))  # type: ignore[union-attr, call-arg]
    _write(figure, heading, text, top + height)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True).flatten()
    for axes, panel in zip(grid, panels, strict=False):
        _draw(axes, panel)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[max(len(panels) - columns, 0) : len(panels)]:  # the lowest of each column
        axes.tick_params(labelbottom=True)
    for axes in grid[(rows - 1) * columns : len(panels)]:
        axes.set_xlabel("epoch", fontsize=9)
    FigureCanvasAgg(figure)
    with atomic_path(Path(path), suffix=".png") as temporary:
        figure.savefig(temporary, format="png")
    return Path(path)


def _wrapped(text: str, columns: int) -> list[str]:
    return textwrap.wrap(text, _WRAP * columns // _COLUMNS, subsequent_indent="    ")


def _write(figure: Figure, heading: str, lines: Sequence[tuple[str, str]], inches: float) -> None:
    """The heading and the findings, from the top of a page so many inches high."""
    figure.text(0.012, 1 - 0.2 / inches, heading, fontsize=12, weight="bold", va="center")
    for n, (severity, line) in enumerate(lines):
        colour = _SEVERITY_COLOURS.get(severity, "#222222")
        figure.text(0.012, 1 - (0.45 + _LINE_INCHES * n) / inches, line, fontsize=9.5, va="center", color=colour)


def _draw(axes: Axes, panel: Panel) -> None:
    if panel.log:
        axes.set_yscale("log", nonpositive="mask")
    for n, (name, (x, y)) in enumerate(panel.series.items()):
        values = np.asarray(y, dtype=float)
        values = np.where(np.isfinite(values), values, np.nan)
        marker = "o" if len(values) < _MARKED_BELOW else None
        axes.plot(
            np.asarray(x, dtype=float),
            values,
            label=name,
            lw=1.2,
            marker=marker,
            ms=3,
            color=_COLOURS[n % len(_COLOURS)],
        )
    for name, level in panel.levels.items():
        axes.axhline(level, color="#999999", lw=0.9, ls="--")
        axes.annotate(
            name, (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7, color="#777777"
        )
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.tick_params(which="both", labelsize=8)
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if any(panel.series):  # one curve without a name is what the title says
        axes.legend(fontsize=7, edgecolor="none", framealpha=0.7, ncols=2 if len(panel.series) > 4 else 1)
