"""The page and the figures of an ablation, on the values that the stand-in gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from neuromf.errors import UserError
from neuromf.pipeline.ablate import ablate
from neuromf.pipeline.pages.ablation import ablation_page
from neuromf.pipeline.pages.ablation_data import by_evaluations, collected, levels
from neuromf.pipeline.pages.collected import Wanted
from neuromf.pipeline.pages.figures import draw_figures
from neuromf.pipeline.report import kind_of
from neuromf.reporting.page import Charts, Missing, Table, Text

Write = Callable[..., Path]


@pytest.fixture
def folder(plan_file: Write, stand_in: tuple[str, ...], calls: Callable[[], list[str]], tmp_path: Path) -> Path:
    """An ablation of ten cells, done by the stand-in."""
    ablate(str(plan_file()), tmp_path / "out", jobs=4, command=stand_in)
    return tmp_path / "out"


def test_the_levels_of_a_comparison_have_the_runs_behind_them(folder: Path) -> None:
    ablation = collected(folder)
    by_level = {level.name: level.values for level in levels(ablation, 0)}
    assert by_level == {"x": pytest.approx([3.0, 3.1]), "u": pytest.approx([8.0, 8.1])}
    assert [(level.name, level.values) for level in levels(ablation, 1)] == [
        ("1.5", pytest.approx([2.5, 2.6])),
        ("2", pytest.approx([3.0, 3.1])),
        ("3", pytest.approx([4.0, 4.1])),
    ]
    assert by_evaluations(ablation, "frechet_builtin") == {"nfe": {1: [3.0], 10: [pytest.approx(2.1)]}}


def test_the_page_answers_each_question_with_its_verdict_and_its_runs(folder: Path) -> None:
    assert kind_of(folder).name == "ablation"
    page = ablation_page(folder, Wanted())
    questions = page.sections[0].blocks
    assert [b.text for b in questions if isinstance(b, Text) and b.heading] == [
        "prediction: objective.prediction", "lp: objective.lp", "nfe: nfe",
    ]  # fmt: skip
    first = next(block for block in questions if isinstance(block, Charts)).charts[0]
    mean, runs = first.lines
    assert first.x_names == ["x", "u"]
    assert list(mean.y) == pytest.approx([3.05, 8.05])
    assert list(runs.x) == [0, 0, 1, 1]
    (cells,) = page.sections[1].blocks
    assert isinstance(cells, Table)
    assert len(cells.rows) == 12
    assert page.tiles[0].value == "12 of 12"


def test_figures_4_5_and_6_are_drawn_and_the_others_named(folder: Path, tmp_path: Path) -> None:
    figures = {f.number: f for f in draw_figures("ablation", folder, tmp_path / "figures", Wanted()).figures}
    assert [number for number, figure in figures.items() if figure.files] == [1, 4, 5, 6]
    for number in (4, 5, 6):
        assert [file.suffix for file in figures[number].files] == [".png", ".pdf"]
        assert all(file.stat().st_size > 2000 for file in figures[number].files)


def test_what_is_not_collected_or_newer_than_the_tables_is_said(folder: Path) -> None:
    import os

    newest = next(iter((folder / "runs").glob("*/*/*/metrics.json")))
    tables = folder / "results/results.json"
    os.utime(newest, (tables.stat().st_mtime + 10,) * 2)
    missing = [b for b in ablation_page(folder, Wanted()).sections[0].blocks if isinstance(b, Missing)]
    assert missing[0].what == "1 evaluation newer than these tables."
    assert missing[0].command.endswith("--collect")
    tables.unlink()
    page = ablation_page(folder, Wanted())
    assert "Nothing is collected yet." in [block.what for block in page.missing]


def test_damaged_results_are_refused(folder: Path) -> None:
    (folder / "results/results.json").write_text("[]")
    with pytest.raises(UserError, match="not what `neuromf ablate` writes"):
        ablation_page(folder, Wanted())
