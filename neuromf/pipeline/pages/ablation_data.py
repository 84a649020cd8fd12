"""The collected results of an ablation as points of a picture: which cells a comparison compares, and their values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from neuromf.errors import UserError
from neuromf.files import read_json
from neuromf.pipeline.ablation.folder import PLAN_FILE
from neuromf.pipeline.ablation.plan import AblationPlan, Comparison, label, read_plan
from neuromf.pipeline.ablation.results import RESULTS_FILE
from neuromf.pipeline.ablation.stages import METRICS, Place
from neuromf.training.diagnosis_evidence import finite
from neuromf.training.telemetry import SUMMARY

Rows = Sequence[Mapping[str, Any]]


class Collected(NamedTuple):
    """An ablation's folder: its plan, and results.json as `ablate` wrote it ({} where it has not yet)."""

    folder: Path
    plan: AblationPlan
    results: Mapping[str, Any]

    @property
    def cells(self) -> Rows:
        """One record per cell."""
        return self.results.get("cells", [])

    @property
    def stale(self) -> int:
        """Evaluations that are newer than the tables."""
        tables = Place(self.folder).results / RESULTS_FILE
        written = tables.stat().st_mtime if tables.is_file() else 0.0
        return sum(path.stat().st_mtime > written for path in Place(self.folder).runs.glob(f"*/*/*/{METRICS}"))


class Level(NamedTuple):
    """One level of a comparison: mean with Student's interval (None for a single run), and every run's value."""

    name: str
    mean: float | None
    low: float | None
    high: float | None
    values: list[float]


def collected(folder: Path) -> Collected:
    """Read an ablation's plan and results.

    Raises:
        UserError: the plan is not valid, or the results are damaged.
    """
    results = Place(folder).results / RESULTS_FILE
    content = read_json(results) if results.is_file() else {}
    if not isinstance(content, dict):
        raise UserError(f"{results} is not what `neuromf ablate` writes", "make it again with --collect")
    return Collected(folder, read_plan(str(folder / PLAN_FILE)), content)


def levels(ablation: Collected, number: int) -> list[Level]:
    """The levels of the comparison of this number, as they were tabled, with the runs behind each."""
    comparison, metric = ablation.plan.comparisons[number], ablation.plan.metric
    found = []
    for row in ablation.results["comparisons"][number]["levels"]:
        name = str(row["level"])
        cells = _cells(ablation, comparison, name)
        values = [value for cell in cells if (value := finite(cell.get(metric))) is not None]
        found.append(Level(name, row.get("mean"), row.get("low"), row.get("high"), values))
    return found


def _cells(ablation: Collected, comparison: Comparison, level: str) -> list[Mapping[str, Any]]:
    """The cells of one level; of runs with several numbers of evaluations the first, unless those are compared."""
    picked = comparison.groups.get(level, {})
    experiment = str(picked.get("experiment", comparison.experiment))
    wanted = {**comparison.where, **{key: value for key, value in picked.items() if key != "experiment"}}
    if comparison.factor:
        wanted[comparison.factor] = level
    wanted.setdefault("nfe", ablation.plan.experiments[experiment].nfe[0])
    return [
        cell
        for cell in ablation.cells
        if cell.get("experiment") == experiment and all(label(cell.get(k)) == label(v) for k, v in wanted.items())
    ]


def by_evaluations(ablation: Collected, metric: str) -> dict[str, dict[int, list[float]]]:
    """Values by number of evaluations, for every model that was sampled with several of them."""
    found: dict[str, dict[int, list[float]]] = {}
    for name, experiment in ablation.plan.experiments.items():
        if len(experiment.nfe) < 2:
            continue
        factors = [factor for factor in experiment.factors if factor != "nfe"]
        for cell in ablation.cells:
            value = finite(cell.get(metric))
            if cell.get("experiment") != name or value is None:
                continue
            model = ", ".join(str(cell.get(factor)) for factor in factors) or name
            found.setdefault(model, {}).setdefault(int(cell["nfe"]), []).append(value)
    return {model: dict(sorted(values.items())) for model, values in found.items()}


def means(values: Mapping[int, Sequence[float]]) -> tuple[list[int], list[float]]:
    """Numbers of evaluations, and the mean at each."""
    return list(values), [float(np.mean(each)) for each in values.values()]


def training_curves(ablation: Collected, figure: str) -> dict[str, tuple[list[int], list[float]]]:
    """A figure of every run over its epochs, by the run's name."""
    curves = {}
    for run in dict.fromkeys(str(cell.get("run")) for cell in ablation.cells):
        path = _run_folder(ablation, run) / SUMMARY
        try:
            summaries = read_json(path) if path.is_file() else []
        except UserError:
            continue
        points = [(int(s["epoch"]), value) for s in summaries if (value := finite(s.get(figure))) is not None]
        if points:
            curves[run] = ([x for x, _ in points], [y for _, y in points])
    return curves


def _run_folder(ablation: Collected, run: str) -> Path:
    """Where a run lies: under its name, or under another one that ends with its identity."""
    runs = Place(ablation.folder).runs
    if (runs / run).is_dir():
        return runs / run
    return next(iter(sorted(runs.glob(f"*-{run.rpartition('-')[2]}"))), runs / run)
