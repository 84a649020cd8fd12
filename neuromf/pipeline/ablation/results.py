"""The tables of an ablation, in CSV, Markdown, LaTeX and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuromf.errors import UserError
from neuromf.files import write_json, write_text
from neuromf.pipeline.ablation.collect import Compared, Measured, cell_rows, compare, measure
from neuromf.pipeline.ablation.folder import Ablation
from neuromf.pipeline.ablation.plan import AblationPlan
from neuromf.reporting.paper_tables import p_text, write_table
from neuromf.reporting.tables import markdown_table

RESULTS_FILE, SUMMARY_FILE = "results.json", "summary.md"


@dataclass(frozen=True)
class Results:
    """The tables of an ablation."""

    plan: AblationPlan
    folder: Path
    cells: list[dict[str, Any]]
    comparisons: list[Compared]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "name": self.plan.name,
            "metric": self.plan.metric,
            "cells": self.cells,
            "comparisons": [answer.to_dict() for answer in self.comparisons],
        }

    def lines(self) -> list[str]:
        """The levels and the verdict of each comparison."""
        lines = [f"metric: {self.plan.metric}"]
        for answer in self.comparisons:
            lines += ["", answer.name, markdown_table(answer.levels), answer.verdict]
        return [*lines, "", f"tables: {self.folder} (CSV, Markdown, LaTeX; {RESULTS_FILE}, {SUMMARY_FILE})"]


def collect(ablation: Ablation) -> Results:
    """Write the tables of what has been evaluated so far: cells, levels and pairs of each comparison, tests.

    Raises:
        UserError: nothing has been evaluated.
    """
    plan, folder = ablation.plan, ablation.place.results
    measured = measure(plan, ablation.cells, ablation.place)
    if not any(found.records for found in measured):
        raise UserError(
            f"nothing is evaluated in {ablation.place.out} yet", "run `neuromf ablate` with this plan first"
        )
    results = Results(plan, folder, cell_rows(plan, measured), compare(plan, measured))
    n = _set_sizes(measured)
    write_table(folder, "cells", results.cells, f"{plan.name}: every cell; {plan.metric} with its 95 % interval{n}.")
    for number, answer in enumerate(results.comparisons, 1):
        stem = f"comparison-{number}"
        caption = (
            f"{answer.name}: {plan.metric} by level, mean over runs with Student's 95 % interval{n}. {answer.verdict}"
        )
        write_table(folder, stem, answer.levels, caption)
        if len(answer.pairs) > 1:
            pairs = [pair._asdict() for pair in answer.pairs]
            write_table(folder, f"{stem}-pairs", pairs, f"{answer.name}: Tukey's HSD, simultaneous 95 % intervals.")
    write_table(folder, "tests", _test_rows(results.comparisons), f"{plan.name}: tests of {plan.metric}.")
    write_json(folder / RESULTS_FILE, results.to_dict())
    write_text(folder / SUMMARY_FILE, _summary(results, n))
    return results


def _set_sizes(measured: Sequence[Measured]) -> str:
    """How many volumes the metric compares, as `evaluate` counted them."""
    for found in measured:
        for record in found.records.values():
            n = record.get("n")
            if isinstance(n, Mapping):
                return f" ({', '.join(f'{count} {name}' for name, count in n.items())})"
    return ""


def _test_rows(comparisons: Sequence[Compared]) -> list[dict[str, Any]]:
    return [
        {
            "comparison": answer.name,
            "levels": len(answer.levels),
            "runs": sum(row["runs"] for row in answer.levels),
            "test": answer.test or "none",
            "statistic": answer.statistic or None,
            "p": None if answer.p is None else p_text(answer.p),
            "p (Holm)": None if answer.p_holm is None else p_text(answer.p_holm),
            "effect": answer.effect or None,
        }
        for answer in comparisons
    ]


def _summary(results: Results, n: str) -> str:
    lines = [f"# {results.plan.name}", "", f"Metric: `{results.plan.metric}`{n}.", ""]
    for answer in results.comparisons:
        lines += [f"## {answer.name}", "", markdown_table(answer.levels), "", answer.verdict, ""]
    missing = [f"- {row['experiment']}, {row['run']}: {row['missing']}" for row in results.cells if row["missing"]]
    lines += ["## Cells", "", markdown_table([{k: v for k, v in r.items() if k != "missing"} for r in results.cells])]
    return "\n".join([*lines, "", *(["Not measured:", "", *missing] if missing else [])]).rstrip() + "\n"
