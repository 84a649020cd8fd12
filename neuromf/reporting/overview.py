"""Figure 1: the method as a diagram, in vectors: what is trained, and how one evaluation makes a volume."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from neuromf.reporting.paper_figures import write_both

_DPI = 200
_SIZE = (100.0, 47.0)
_INK, _SOFT, _FROZEN, _TRAINED, _DATA = "#20242a", "#5c636d", "#e7edf3", "#d9efe9", "#ffffff"
_EDGE = {_FROZEN: "#7d93a8", _TRAINED: "#2f8f78", _DATA: "#b9bec5"}


class Box(NamedTuple):
    """A box by its middle, its half width and half height."""

    x: float
    y: float
    w: float
    h: float

    def side(self, where: str) -> tuple[float, float]:
        """The middle of a side: left, right, top, bottom."""
        dx, dy = {"left": (-1, 0), "right": (1, 0), "top": (0, 1), "bottom": (0, -1)}[where]
        return self.x + dx * self.w, self.y + dy * self.h


def overview(stem: str | Path, *, prediction: str = "x", latent: str = "", volume: str = "") -> list[Path]:
    """Draw training above and generation below, as `<stem>.png` and `<stem>.pdf`.

    Args:
        prediction: what the network gives, `x` (the data, from which u follows) or `u`.
        latent: shape of a latent, shown where one is, such as `4 x 48 x 56 x 48`.
        volume: shape of a volume.
    """
    figure = Figure(figsize=(10, 10 * _SIZE[1] / _SIZE[0]), dpi=_DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, _SIZE[0])
    axes.set_ylim(0, _SIZE[1])
    axes.set_axis_off()
    _training(axes, prediction, latent, volume)
    _generation(axes, latent, volume)
    return write_both(figure, stem)


def _training(axes: Axes, prediction: str, latent: str, volume: str) -> None:
    _heading(axes, 45.0, "Training")
    scan = _box(axes, Box(7.5, 36, 5.5, 4), "scan", volume, _DATA)
    encoder = _box(axes, Box(21, 36, 5.5, 4), "encoder", "frozen", _FROZEN)
    x = _box(axes, Box(34.5, 36, 5.5, 4), "latent $x$", latent, _DATA)
    path = _box(axes, Box(50.5, 36, 8, 4), "$z_t = (1-t)\\,x + t\\,\\epsilon$", "$0 \\leq r \\leq t \\leq 1$", _DATA)
    network = _box(axes, Box(68, 36, 6.5, 4), "network $\\theta$", "trained", _TRAINED)
    u = _box(axes, Box(88, 36, 10, 4), "$u_\\theta(z_t, r, t)$", _prediction(prediction), _DATA)
    noise = _box(axes, Box(50.5, 26, 8, 2.6), "noise $\\epsilon$", "", _DATA)
    loss = _box(
        axes,
        Box(88, 24, 10, 5),
        "$|\\,V - (\\epsilon - x)\\,|^p$",
        "$V = u_\\theta + (t - r)\\,\\mathrm{sg}[du/dt]$",
        _DATA,
    )
    derivative = _box(axes, Box(68, 24, 6.5, 3.6), "$du/dt$", "forward mode,\nno gradient", _TRAINED)
    for one, other in ((scan, encoder), (encoder, x), (x, path), (path, network), (network, u)):
        _arrow(axes, one.side("right"), other.side("left"))
    _arrow(axes, noise.side("top"), path.side("bottom"))
    _arrow(axes, network.side("bottom"), derivative.side("top"), dashed=True)
    _arrow(axes, derivative.side("right"), loss.side("left"))
    _arrow(axes, u.side("bottom"), loss.side("top"))


def _generation(axes: Axes, latent: str, volume: str) -> None:
    _heading(axes, 15.5, "Generation: one evaluation")
    noise = _box(axes, Box(7.5, 7, 5.5, 4), "noise $\\epsilon$", latent, _DATA)
    network = _box(axes, Box(26.5, 7, 6.5, 4), "network $\\theta$", "$r = 0,\\ t = 1$", _TRAINED)
    x = _box(axes, Box(49, 7, 9.5, 4), "$x = \\epsilon - u_\\theta(\\epsilon, 0, 1)$", "a new latent", _DATA)
    decoder = _box(axes, Box(70.5, 7, 5.5, 4), "decoder", "frozen", _FROZEN)
    new = _box(axes, Box(91.5, 7, 6.5, 4), "new volume", volume, _DATA)
    for one, other in ((noise, network), (network, x), (x, decoder), (decoder, new)):
        _arrow(axes, one.side("right"), other.side("left"))


def _prediction(name: str) -> str:
    return "$u = (z_t - \\hat{x}_\\theta)\\,/\\,t$" if name == "x" else "predicted as it is"


def _heading(axes: Axes, y: float, text: str) -> None:
    axes.text(2, y, text, fontsize=12, weight="bold", va="center", color=_INK)
    axes.plot([2, 98], [y - 2.2, y - 2.2], color="#d9d9d9", lw=0.8)


def _box(axes: Axes, box: Box, text: str, below: str, fill: str) -> Box:
    axes.add_patch(
        FancyBboxPatch(
            (box.x - box.w, box.y - box.h),
            2 * box.w,
            2 * box.h,
            boxstyle="round,pad=0,rounding_size=1.1",
            facecolor=fill,
            edgecolor=_EDGE[fill],
            lw=1.1,
        )
    )
    lift = 1.3 if below else 0.0
    axes.text(box.x, box.y + lift, text, ha="center", va="center", fontsize=10, color=_INK)
    if below:
        axes.text(box.x, box.y - 1.6, below, ha="center", va="center", fontsize=7.5, color=_SOFT, linespacing=1.15)
    return box


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], *, dashed: bool = False) -> None:
    style: Any = (0, (4, 3)) if dashed else "-"
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=11, color=_INK, lw=1.1, shrinkA=2, shrinkB=2, linestyle=style
        )
    )
