"""Pictures of volumes and curves: arrays in, PNG or PDF files out (by the suffix); no display needed.

Orientation, for arrays in RAS+ (axis I to the subject's right, J to anterior, K to superior): superior is up
in sagittal and coronal planes, anterior is up in axial ones; the subject's left is on the left of coronal
and axial planes ("neurological"); the sagittal plane looks at the left side, the face to the left.
One grey window, [0, 1], serves every panel of a picture, so brightness can be compared.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator
from numpy.typing import ArrayLike, NDArray

from neuromf.files import atomic_path

Plane = Literal["sagittal", "coronal", "axial"]
PLANES: tuple[Plane, ...] = ("sagittal", "coronal", "axial")
WINDOW = (0.0, 1.0)

_DPI = 100
_GAP_VOXELS = 2
_LABEL_INCHES = 1.3
_TITLE_INCHES = 0.28
_DOTS = 40
_OUTLINE = "#ff4d3d"
_SERIES_COLOURS = ("#222222", "#d1495b", "#2e86ab", "#edae49", "#66a182", "#8d6a9f")


def plane_image(
    volume: ArrayLike, plane: Plane, index: int | None = None, *, spacing_mm: Sequence[float] = (1, 1, 1)
) -> NDArray[np.float32]:
    """One slice of a RAS+ volume as an image (rows from the top, columns from the left).

    Args:
        volume: (I, J, K); (1, I, J, K) is taken too.
        plane: which plane.
        index: voxel along the plane's normal; the middle when None.
        spacing_mm: voxel size; anisotropic slices are repeated to the smallest spacing.
    """
    array = np.asarray(volume, dtype=np.float32)
    array = array[0] if array.ndim == 4 else array
    if array.ndim != 3:
        raise ValueError(f"a volume has three axes (I, J, K), got shape {array.shape}")
    normal = PLANES.index(plane)
    slice_ = np.take(array, array.shape[normal] // 2 if index is None else index, axis=normal)
    image = slice_.T[::-1]  # first remaining axis to the right, second one up
    if plane == "sagittal":
        image = image[:, ::-1]  # anterior to the left
    across, up = (spacing_mm[axis] for axis in range(3) if axis != normal)
    finest = min(spacing_mm)
    return _stretch(_stretch(image, up / finest, 0), across / finest, 1)


def three_planes(
    volume: ArrayLike, *, spacing_mm: Sequence[float] = (1, 1, 1), at: Sequence[int] | None = None
) -> NDArray[np.float32]:
    """Sagittal, coronal and axial slices, the middle ones or through voxel `at`, side by side on black as one image."""
    places: Sequence[int | None] = (None, None, None) if at is None else at
    images = [plane_image(volume, plane, i, spacing_mm=spacing_mm) for plane, i in zip(PLANES, places, strict=True)]
    height = max(image.shape[0] for image in images)
    gap = np.zeros((height, _GAP_VOXELS), dtype=np.float32)
    sagittal, coronal, axial = (_pad(image, height) for image in images)
    return np.concatenate([sagittal, gap, coronal, gap, axial], axis=1)


def montage(
    volumes: Sequence[ArrayLike],
    titles: Sequence[str],
    path: str | Path,
    *,
    columns: int = 4,
    spacing_mm: Sequence[float] = (1, 1, 1),
    heading: str = "",
    masks: Sequence[ArrayLike] | None = None,
) -> Path:
    """Draw each volume's three middle slices under its title, `columns` volumes to a row.

    Args:
        volumes: (I, J, K) or (1, I, J, K) each, RAS+, [0, 1]; shapes may differ.
        titles: one per volume.
        masks: of the volumes' shapes, drawn as outlines; the slices then go through the middle of what is marked.
    """
    if not volumes or len(titles) != len(volumes):
        raise ValueError(f"{len(volumes)} volumes need as many titles, and at least one; got {len(titles)}")
    places = [None] * len(volumes) if masks is None else [_middle(mask) for mask in masks]
    tiles = [three_planes(v, spacing_mm=spacing_mm, at=at) for v, at in zip(volumes, places, strict=True)]
    columns = min(columns, len(tiles))
    height, width = max(t.shape[0] for t in tiles), max(t.shape[1] for t in tiles)
    rows = -(-len(tiles) // columns)
    inches = _tile_inches(height, width, columns)
    top = _TITLE_INCHES if heading else 0.0
    figure = Figure(figsize=(columns * inches[1], rows * (inches[0] + _TITLE_INCHES) + top), dpi=_DPI)
    total = figure.get_figheight()
    for n, (tile, title) in enumerate(zip(tiles, titles, strict=True)):
        row, column = divmod(n, columns)
        bottom = total - top - (row + 1) * (inches[0] + _TITLE_INCHES)
        axes = figure.add_axes((column / columns, bottom / total, 0.985 / columns, inches[0] / total))
        _show(axes, _pad(tile, height, width))
        if masks is not None and np.any(masks[n]):
            outline = _pad(three_planes(masks[n], spacing_mm=spacing_mm, at=places[n]), height, width)
            axes.contour(outline, levels=[0.5], colors=_OUTLINE, linewidths=0.9)
        axes.set_title(title, fontsize=9, pad=3, loc="left")
    if heading:
        figure.text(0.004, 1 - 0.5 * top / total, heading, fontsize=11, weight="bold", va="center")
    return save(figure, path)


def comparison_sheet(
    rows: Mapping[str, Sequence[ArrayLike]],
    path: str | Path,
    *,
    spacing_mm: Sequence[float] = (1, 1, 1),
    heading: str = "",
) -> Path:
    """Draw sets of volumes under one another: a row per set, a column per sample, three planes each.

    Args:
        rows: label -> volumes, (I, J, K) or (1, I, J, K), RAS+, [0, 1]; drawn in this order. Rows may have
            different lengths.
    """
    if not rows or not any(len(volumes) for volumes in rows.values()):
        raise ValueError("a comparison sheet needs at least one row with a volume")
    tiles = {k: [three_planes(v, spacing_mm=spacing_mm) for v in volumes] for k, volumes in rows.items()}
    columns = max(len(line) for line in tiles.values())
    height = max(tile.shape[0] for line in tiles.values() for tile in line)
    width = max(tile.shape[1] for line in tiles.values() for tile in line)
    inches = _tile_inches(height, width, columns)
    gap, top = 0.06, _TITLE_INCHES if heading else 0.0
    page = (_LABEL_INCHES + columns * (inches[1] + gap), top + len(tiles) * (inches[0] + gap))
    figure = Figure(figsize=page, dpi=_DPI)
    for row, (label, line) in enumerate(tiles.items()):
        bottom = page[1] - top - (row + 1) * (inches[0] + gap)
        figure.text(
            0.08 / page[0],
            (bottom + inches[0] / 2) / page[1],
            _wrapped(label),
            fontsize=10,
            va="center",
            linespacing=1.3,
        )
        for column, tile in enumerate(line):
            left = _LABEL_INCHES + column * (inches[1] + gap)
            box = (left / page[0], bottom / page[1], inches[1] / page[0], inches[0] / page[1])
            _show(figure.add_axes(box), _pad(tile, height, width))
    if heading:
        figure.text(0.08 / page[0], 1 - 0.5 * top / page[1], heading, fontsize=11, weight="bold", va="center")
    return save(figure, path)


def curves(
    panels: Mapping[str, Mapping[str, tuple[ArrayLike, ArrayLike]]],
    path: str | Path,
    *,
    x_label: str = "step",
    log_y: Sequence[str] = (),
    levels: Mapping[str, float] | None = None,
    heading: str = "",
) -> Path:
    """Draw training curves, one panel per quantity, panels side by side in rows of three.

    Args:
        panels: panel title -> series name -> (x, y); values that are not finite leave gaps.
        log_y: titles of the panels with a logarithmic axis (used where the values are positive and spread enough).
        levels: panel title -> a value to compare with, a dotted line.
    """
    if not panels:
        raise ValueError("no panel to draw")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = _grid(rows, columns, 0.35 if heading else 0.1)
    for axes, (title, series) in zip(grid, panels.items(), strict=False):
        drawn = [_curve(axes, n, name, x, y) for n, (name, (x, y)) in enumerate(series.items())]
        if levels and title in levels:
            axes.axhline(levels[title], color="#888888", lw=0.9, ls=":", zorder=0)
        spread = _spread(drawn) if title in log_y else 0
        if spread > 4:  # below it, plain axes have more ticks
            log_axis(axes, spread)
        dress(axes, title, x_label, "", legend=len(series) > 1)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k, or the numbers run into one another
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    if heading:
        figure.text(0.008, 1 - 0.18 / figure.get_figheight(), heading, fontsize=11, weight="bold", va="center")
    return save(figure, path)


def _grid(rows: int, columns: int, top_inches: float) -> tuple[Figure, list[Axes]]:
    """Panels of one size at fixed places: matplotlib's automatic layout takes as long as all of the drawing."""
    left, right, above, below, size = 0.55, 0.15, 0.3, 0.5, (3.9, 2.45)
    width, height = left + size[0] + right, above + size[1] + below
    page = (columns * width, rows * height + top_inches)
    figure = Figure(figsize=page, dpi=_DPI)
    corners = [(c * width + left, (rows - 1 - r) * height + below) for r in range(rows) for c in range(columns)]
    boxes = [(x / page[0], y / page[1], size[0] / page[0], size[1] / page[1]) for x, y in corners]
    return figure, [figure.add_axes(box) for box in boxes]


def _curve(axes: Axes, n: int, name: str, x: ArrayLike, y: ArrayLike) -> NDArray[np.float64]:
    """Draw one series, with dots where it has few points; returns its finite values."""
    values = np.asarray(y, dtype=float)
    values = np.where(np.isfinite(values), values, np.nan)
    marker = "o" if len(values) <= _DOTS else ""
    axes.plot(np.asarray(x, dtype=float), values, label=name, lw=1.2, color=colour(n), marker=marker, ms=2.8)
    return values[~np.isnan(values)]


def log_axis(axes: Axes, spread: float) -> None:
    """A logarithmic y axis with plain numbers, the more of them the less it spreads (largest over smallest value)."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=_log_ticks(spread)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _log_ticks(spread: float) -> tuple[float, ...]:
    """The ticks of a decade, the more the fewer decades there are."""
    if spread < 15:
        return (1, 1.5, 2, 3, 4, 6, 8)
    return (1, 2, 5) if spread < 300 else (1,)


def _spread(series: Sequence[NDArray[np.float64]]) -> float:
    """The largest over the smallest of all values; 0 where there are none, or not all are positive."""
    values = np.concatenate([*series, []])
    return float(values.max() / values.min()) if values.size and values.min() > 0 else 0.0


def spectrum_plot(frequency: ArrayLike, power: Mapping[str, ArrayLike], path: str | Path) -> Path:
    """Draw radial power spectra: the mean of each set, and the 5th to 95th percentile of its volumes.

    Args:
        frequency: (F,) in cycles/mm.
        power: set name -> (N, F).
    """
    figure, axes = _single_panel()
    x = np.asarray(frequency, dtype=float)
    for n, (name, values) in enumerate(power.items()):
        y = np.clip(np.asarray(values, dtype=float), 1e-30, None)
        axes.fill_between(x, *np.percentile(y, [5, 95], axis=0), color=colour(n), alpha=0.15, lw=0)
        axes.plot(x, y.mean(0), color=colour(n), lw=1.6, label=f"{name} (N = {len(y)})")
    axes.set_yscale("log")
    dress(axes, "Radial power spectrum", "spatial frequency (cycles/mm)", "power per coefficient", legend=True)
    return save(figure, path)


def histograms(
    values: Mapping[str, ArrayLike],
    path: str | Path,
    *,
    title: str = "Voxel intensities",
    x_label: str = "intensity (p0 = 0, p99.5 = 1)",
    bins: ArrayLike | None = None,
    log_y: bool = True,
) -> Path:
    """Draw the distributions of several sets over one another, each normalised to area 1.

    Args:
        values: set name -> values of any shape; or, with `bins`, densities (len(bins) - 1,).
        bins: edges the densities belong to; when None 100 common bins are made.
    """
    figure, axes = _single_panel()
    arrays = {name: np.asarray(v, dtype=float).ravel() for name, v in values.items()}
    if bins is None:
        low, high = min(a.min() for a in arrays.values()), max(a.max() for a in arrays.values())
        edges = np.linspace(low, high if high > low else low + 1, 101)
        arrays = {name: np.histogram(a, edges, density=True)[0] for name, a in arrays.items()}
    else:
        edges = np.asarray(bins, dtype=float)
    for n, (name, density) in enumerate(arrays.items()):
        axes.stairs(density, edges, color=colour(n), lw=1.4, label=name)
    if log_y:
        axes.set_yscale("log")
    dress(axes, title, x_label, "density", legend=True)
    return save(figure, path)


def _single_panel() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.6, 4.0), dpi=_DPI)
    return figure, figure.add_axes((0.13, 0.13, 0.84, 0.79))


def _show(axes: Axes, image: NDArray[np.float32]) -> None:
    axes.imshow(image, cmap="gray", vmin=WINDOW[0], vmax=WINDOW[1], interpolation="bicubic", aspect="equal")
    axes.set_axis_off()


def dress(axes: Axes, title: str, x_label: str, y_label: str, *, legend: bool) -> None:
    """Title, labels and a quiet grid, the same in every picture."""
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x_label, fontsize=9)
    axes.set_ylabel(y_label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if legend and axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8, frameon=False)


def _tile_inches(height: int, width: int, columns: int) -> tuple[float, float]:
    """Size of one tile on the page: two screen pixels a voxel, unless the page would exceed 20 inches."""
    scale = min(2.0 / _DPI, 20.0 / (columns * width))
    return height * scale, width * scale


def _stretch(image: NDArray[np.float32], factor: float, axis: int) -> NDArray[np.float32]:
    length = max(round(image.shape[axis] * factor), 1)
    if length == image.shape[axis]:
        return image
    positions = ((np.arange(length) + 0.5) / factor).astype(int).clip(0, image.shape[axis] - 1)
    return np.take(image, positions, axis=axis)


def _wrapped(label: str) -> str:
    """A row label in lines that fit beside the tiles."""
    return "\n".join(textwrap.fill(line, 16) for line in label.replace(": ", ":\n").split("\n"))


def _middle(mask: ArrayLike) -> tuple[int, int, int] | None:
    """The marked voxel nearest to the middle of what a mask (I, J, K) or (1, I, J, K) marks; None if it is empty."""
    array = np.asarray(mask, dtype=bool)
    marked = np.argwhere(array[0] if array.ndim == 4 else array)
    if not len(marked):
        return None
    i, j, k = marked[np.square(marked - marked.mean(0)).sum(1).argmin()]
    return int(i), int(j), int(k)


def _pad(image: NDArray[np.float32], height: int, width: int = 0) -> NDArray[np.float32]:
    """Centre an image on black."""
    rows, columns = height - image.shape[0], max(width - image.shape[1], 0)
    before = rows // 2, columns // 2
    return np.pad(image, ((before[0], rows - before[0]), (before[1], columns - before[1])))


def colour(n: int) -> str:
    """The colour of the n-th series of a picture."""
    return _SERIES_COLOURS[n % len(_SERIES_COLOURS)]


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure in the format of the path's suffix, PNG or PDF; the same figure gives the same bytes."""
    path = Path(path)
    FigureCanvasAgg(figure)
    dated = {"CreationDate": None} if path.suffix == ".pdf" else None
    with atomic_path(path, suffix=path.suffix) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], metadata=dated)
    return path
