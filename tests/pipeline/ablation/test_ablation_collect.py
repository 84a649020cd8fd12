"""What the collected tables say, on values whose answer is known."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from neuromf.pipeline.ablate import ablate
from neuromf.pipeline.ablation.cells import Cell, cells_of
from neuromf.pipeline.ablation.collect import Compared, Measured, cell_rows, compare
from neuromf.pipeline.ablation.plan import AblationPlan, read_plan

Write = Callable[..., Path]


def measured(
    text: str, plan_file: Write, value: Callable[[Cell], float], better: str = "lower"
) -> tuple[AblationPlan, list[Measured]]:
    """A plan, and its cells with the values that a function gives them."""
    plan = read_plan(str(plan_file("phantoms: {}\npreset: demo\nmetric: m\n" + text)))

    def record(cell: Cell) -> Mapping[str, Any]:
        return {"value": value(cell), "low": None, "high": None, "better": better}

    return plan, [Measured(cell, {"m": record(cell)}, "") for cell in cells_of(plan, "latents", {})]


def test_two_levels_are_compared_by_welch_and_a_difference_is_said_with_its_interval(plan_file: Write) -> None:
    values = {"x": [1.0, 1.1, 1.3], "u": [3.0, 3.4, 3.1]}
    plan, cells = measured(
        "grid: {objective.prediction: [x, u]}\nseeds: [0, 1, 2]",
        plan_file,
        lambda cell: values[cell.factors["objective.prediction"]][cell.seed],
    )
    (answer,) = compare(plan, cells)
    assert (answer.test, answer.null) == ("Welch's t", False)
    assert answer.p == pytest.approx(stats.ttest_ind(values["x"], values["u"], equal_var=False).pvalue)
    assert answer.p_holm == answer.p
    assert [(row["level"], row["runs"]) for row in answer.levels] == [("x", 3), ("u", 3)]
    assert answer.levels[1]["ratio"] == pytest.approx(9.5 / 3.4)
    assert "There is a difference" in answer.verdict
    assert "x is below u by 2.033" in answer.verdict
    assert "The best mean is that of x: 1.133" in answer.verdict


def test_a_null_result_is_said_to_be_one(plan_file: Write) -> None:
    values = {"x": [1.0, 2.0, 3.0], "u": [1.2, 2.9, 2.0]}
    plan, cells = measured(
        "grid: {objective.prediction: [x, u]}\nseeds: [0, 1, 2]",
        plan_file,
        lambda cell: values[cell.factors["objective.prediction"]][cell.seed],
    )
    (answer,) = compare(plan, cells)
    assert answer.null
    assert answer.verdict.startswith("No difference was found (t(")
    assert "what remains possible" in answer.verdict


def test_more_levels_are_compared_by_anova_and_tukey_and_the_family_is_adjusted(plan_file: Write) -> None:
    text = (
        "experiments:\n  lp: {grid: {objective.lp: [1, 2, 3]}, seeds: [0, 1]}\n"
        "  p: {grid: {objective.norm_p: [0.1, 0.9]}, seeds: [0, 1]}"
    )

    def value(cell: Cell) -> float:
        level = float(next(iter(cell.factors.values())))
        return (level if cell.experiment == "lp" else 5.0) + (0.1 + 0.01 * level) * cell.seed

    plan, cells = measured(text, plan_file, value, better="higher")
    lp, p = compare(plan, cells)
    assert lp.test == "ANOVA and Tukey's HSD"
    assert [(pair.first, pair.second) for pair in lp.pairs] == [("1", "2"), ("1", "3"), ("2", "3")]
    assert lp.p is not None
    assert p.p is not None
    assert lp.p < p.p
    assert (lp.p_holm, p.p_holm) == (pytest.approx(2 * lp.p), pytest.approx(max(p.p, 2 * lp.p)))
    assert "1 is below 2 by" in lp.verdict
    assert "The best mean is that of 3" in lp.verdict


def test_one_run_per_level_is_tabled_and_not_tested(plan_file: Write) -> None:
    plan, cells = measured("nfe: [1, 10, 50]\ncomparisons: [{experiment: small, factor: nfe, baseline: 50}]", plan_file,
                           lambda cell: 2 + 2 / cell.nfe)  # fmt: skip
    (answer,) = compare(plan, cells)
    assert answer.p is None
    assert "No test: one run says nothing about chance" in answer.verdict
    assert [row["ratio"] for row in answer.levels] == pytest.approx([4 / 2.04, 2.2 / 2.04, 1])


def test_the_same_runs_at_several_evaluations_are_blocks(plan_file: Write) -> None:
    # Runs differ by 100, numbers of evaluations by 1: only what the runs share is taken out.
    def value(cell: Cell) -> float:
        return 100.0 * cell.seed + cell.nfe + 0.01 * (cell.seed * cell.nfe % 3)

    text = "nfe: [1, 2, 3]\nseeds: [0, 1, 2]\ncomparisons: [{experiment: small, factor: nfe}]"
    (answer,) = compare(*measured(text, plan_file, value))
    assert answer.test.endswith("seeds as blocks")
    assert answer.p is not None
    assert answer.p < 1e-6


def test_groups_pick_cells_across_experiments_and_only_the_first_number_of_evaluations(plan_file: Write) -> None:
    text = (
        "experiments:\n  a: {grid: {objective.prediction: [x, u]}, seeds: [0, 1], nfe: [1, 10]}\n"
        "  b: {settings: {objective.name: rectflow}, seeds: [0, 1]}\n"
        "comparisons: [{name: q, groups: {mine: {experiment: a, objective.prediction: x}, theirs: {experiment: b}}}]"
    )
    plan, cells = measured(text, plan_file, lambda cell: cell.seed + 10 * cell.nfe + 100 * (cell.experiment == "b"))
    (answer,) = compare(plan, cells)
    assert [(row["level"], row["runs"], row["mean"]) for row in answer.levels] == [
        ("mine", 2, 10.5),
        ("theirs", 2, 110.5),
    ]


def test_a_metric_that_was_not_computed_is_told_with_its_reason(plan_file: Write) -> None:
    plan, cells = measured("seeds: [0]", plan_file, lambda _: 1.0)
    rows = cell_rows(plan, [cells[0]._replace(records={}, missing="m was not computed: no weights")])
    assert rows[0]["missing"] == "m was not computed: no weights"
    assert rows[0]["m"] is None


def test_a_verdict_needs_a_test() -> None:
    assert not Compared("q", []).null


def test_tables_are_written_in_all_forms(
    plan_file: Write, tmp_path: Path, stand_in: tuple[str, ...], calls: Callable[[], list[str]]
) -> None:
    report = ablate(str(plan_file()), tmp_path / "out", jobs=4, command=stand_in)
    folder = tmp_path / "out" / "results"
    assert report.results is not None
    results = json.loads((folder / "results.json").read_text())
    assert [answer["name"] for answer in results["comparisons"]] == [
        "prediction: objective.prediction", "lp: objective.lp", "nfe: nfe",
    ]  # fmt: skip
    with (folder / "cells.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 12
    assert [row["frechet_builtin"] for row in rows if row["experiment"] == "nfe"] == ["3.0", "2.1"]
    assert "4 generated, 3 real" in (folder / "cells.md").read_text()
    assert r"\toprule" in (folder / "comparison-2-pairs.tex").read_text()
    summary = (folder / "summary.md").read_text()
    assert "## lp: objective.lp" in summary
    assert "Not measured" not in summary
