"""The picture of a diagnosis."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread

from neuromf.reporting import diagnosis
from neuromf.reporting.diagnosis import Panel, diagnosis_figure

EPOCHS = list(range(1, 21))
RISING = Panel("loss", {"a": (EPOCHS, [float(e) for e in EPOCHS])})


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """The axes that are drawn, in order."""
    seen: list[Axes] = []
    draw = diagnosis._draw

    def remember(axes: Axes, panel: Panel) -> None:
        draw(axes, panel)
        seen.append(axes)

    monkeypatch.setattr(diagnosis, "_draw", remember)
    return seen


def test_panels_share_the_axis_of_epochs(tmp_path: Path, drawn: list[Axes]) -> None:
    late = Panel("late", {"b": ([100, 200], [1.0, 2.0])})
    diagnosis_figure(tmp_path / "a.png", [RISING, late, RISING, late])
    assert len({axes.get_xlim() for axes in drawn}) == 1
    assert drawn[0].get_xlim()[1] >= 200
    assert [axes.get_title(loc="left") for axes in drawn] == ["loss", "late", "loss", "late"]


def test_what_has_no_place_on_a_logarithmic_scale_leaves_a_gap(tmp_path: Path, drawn: list[Axes]) -> None:
    values = [0.0, math.inf, math.nan, *(10.0**e for e in range(17))]
    diagnosis_figure(tmp_path / "a.png", [Panel("log", {"a": (EPOCHS, values)}, log=True), RISING])
    assert [axes.get_yscale() for axes in drawn] == ["log", "linear"]
    assert 0 < drawn[0].get_ylim()[0] < 1
    assert drawn[0].get_ylim()[1] < 1e18


def test_a_named_curve_has_its_name_beside_it(tmp_path: Path, drawn: list[Axes]) -> None:
    diagnosis_figure(tmp_path / "a.png", [RISING, Panel("rate", {"": RISING.series["a"]})])
    assert [axes.get_legend() is None for axes in drawn] == [False, True]


def test_levels_are_drawn_across(tmp_path: Path, drawn: list[Axes]) -> None:
    diagnosis_figure(tmp_path / "a.png", [RISING._replace(levels={"chance": 7.0})])
    assert list(drawn[0].lines[-1].get_ydata()) == [7.0, 7.0]
    assert [text.get_text() for text in drawn[0].texts] == ["chance"]


def test_few_epochs_are_marked_one_by_one(tmp_path: Path, drawn: list[Axes]) -> None:
    diagnosis_figure(tmp_path / "a.png", [Panel("few", {"a": ([24, 99], [1.0, 2.0])}), RISING])
    assert [axes.lines[0].get_marker() for axes in drawn] == ["o", "None"]


def test_findings_stand_above_the_panels_in_the_colour_of_their_severity(tmp_path: Path) -> None:
    plain = imread(diagnosis_figure(tmp_path / "a.png", [RISING] * 3, heading="run"))
    told = imread(
        diagnosis_figure(tmp_path / "b.png", [RISING] * 3, heading="run", findings=[("problem", "it diverges " * 20)])
    )
    more = told.shape[0] - plain.shape[0]
    assert more >= 40  # two lines
    top = told[: more + 45]
    red = (top[..., 0] > 0.6) & (top[..., 1] < 0.4)
    assert red.sum() > 200
    assert np.abs(told[-250:] - plain[-250:]).mean() < 0.05


def test_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no panel"):
        diagnosis_figure(tmp_path / "a.png", [])
