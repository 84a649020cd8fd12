"""The results of an ablation: a line for every cell, a comparison for every question, and what each comes to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from neuromf.errors import UserError
from neuromf.files import read_json
from neuromf.metrics.comparisons import Pair, anova, holm, mean_interval, tukey, welch
from neuromf.pipeline.ablation.cells import Cell
from neuromf.pipeline.ablation.plan import AblationPlan, Comparison, label
from neuromf.pipeline.ablation.stages import METRICS, Place, evaluation_of
from neuromf.reporting.paper_tables import interval_text, p_text
from neuromf.reporting.tables import format_number

ALPHA = 0.05


class Measured(NamedTuple):
    """A cell with what was measured of it: records by metric, and why there is none."""

    cell: Cell
    records: Mapping[str, Mapping[str, Any]]
    missing: str

    def value(self, metric: str) -> float | None:
        """The metric's value; None where it was not measured."""
        found = self.records.get(metric, {}).get("value")
        return None if found is None or not math.isfinite(found) else float(found)


@dataclass(frozen=True)
class Compared:
    """The answer to one question of a plan.

    Attributes:
        name: of the comparison.
        levels: one record each: level, runs, mean, sd, low, high, ratio to the baseline's mean.
        test: what was computed; "" where nothing could be.
        statistic: in words, as in `t(3.8) = -2.1`.
        p, p_holm: as computed, and adjusted for all comparisons of the plan.
        effect: its size, in words.
        pairs: of Tukey's HSD.
        verdict: one sentence or two.
    """

    name: str
    levels: list[dict[str, Any]]
    test: str = ""
    statistic: str = ""
    p: float | None = None
    p_holm: float | None = None
    effect: str = ""
    pairs: list[Pair] = field(default_factory=list)
    verdict: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**self.__dict__, "pairs": [pair._asdict() for pair in self.pairs]}

    @property
    def null(self) -> bool:
        """Whether a test was made and found nothing."""
        return self.p_holm is not None and self.p_holm >= ALPHA


def measure(plan: AblationPlan, cells: Sequence[Cell], place: Place) -> list[Measured]:
    """What `evaluate` found of each cell."""
    found = []
    for cell in cells:
        path = evaluation_of(cell, plan, place) / METRICS
        if not path.is_file():
            found.append(Measured(cell, {}, "not evaluated yet"))
            continue
        content = read_json(path)
        missing = "" if plan.metric in content["metrics"] else _why(plan.metric, content)
        found.append(Measured(cell, content["metrics"], missing))
    return found


def _why(metric: str, content: Mapping[str, Any]) -> str:
    reason = content.get("not_computed", {}).get(metric)
    there = ", ".join(sorted(content["metrics"]))
    return f"{metric} was not computed: {reason}" if reason else f"there is no metric {metric}; there are {there}"


def cell_rows(plan: AblationPlan, measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """One record per cell: its levels, the metric with its interval, further metrics, its run."""
    rows = []
    for cell, records, missing in measured:
        entry = records.get(plan.metric, {})
        row: dict[str, Any] = {"experiment": cell.experiment, **cell.factors, "seed": cell.seed, "nfe": cell.nfe}
        row[plan.metric] = entry.get("value")
        row |= {"low": entry.get("low"), "high": entry.get("high")}
        row |= {name: records.get(name, {}).get("value") for name in plan.also}
        rows.append(row | {"run": cell.run.name, "missing": missing or None})
    heads = list(dict.fromkeys(key for row in rows for key in row))
    last = [plan.metric, "low", "high", *plan.also, "run", "missing"]
    return [{key: row.get(key) for key in [*(h for h in heads if h not in last), *last]} for row in rows]


def compare(plan: AblationPlan, measured: Sequence[Measured]) -> list[Compared]:
    """Every comparison of the plan; the p-values of all are adjusted together (Holm)."""
    better = next((str(m.records[plan.metric]["better"]) for m in measured if plan.metric in m.records), "lower")
    answers = [_compare(plan, comparison, measured, better) for comparison in plan.comparisons]
    tested = [answer for answer in answers if answer.p is not None]
    adjusted = dict(zip(map(id, tested), holm([answer.p for answer in tested if answer.p is not None]), strict=True))
    answers = [replace(answer, p_holm=adjusted.get(id(answer))) for answer in answers]
    return [replace(a, verdict=_verdict(a, better)) if a.p is not None else a for a in answers]


def _compare(plan: AblationPlan, comparison: Comparison, measured: Sequence[Measured], better: str) -> Compared:
    groups, blocks = _levels(plan, comparison, measured)
    name = comparison.name or f"{comparison.experiment}: {comparison.factor}"
    present = {level: values for level, values in groups.items() if values}
    levels = _level_rows(groups, comparison.baseline)
    absent = [level for level, values in groups.items() if not values]
    note = f"Nothing was measured of {', '.join(absent)}. " if absent else ""
    of_runs = comparison.block == "seed" or comparison.factor == "nfe"  # then each level has the same runs
    try:
        answer = _test(comparison, present, {k: blocks[k] for k in present} if of_runs else None)
    except UserError as error:
        return Compared(name, levels, verdict=f"{note}No test: {error.message}.{_best(levels, better)}")
    return replace(answer, name=name, levels=levels, verdict=note)


def _levels(
    plan: AblationPlan, comparison: Comparison, measured: Sequence[Measured]
) -> tuple[dict[str, list[float]], dict[str, list[int]]]:
    """(values, seeds) by level.

    Of a run that is sampled with several numbers of evaluations only the first is taken, unless these are compared or
    asked for: they are not independent of one another.
    """
    groups: dict[str, list[float]] = {}
    seeds: dict[str, list[int]] = {}
    for level, wanted, experiment in _picks(comparison):
        first = plan.experiments[experiment].nfe[0]
        if "nfe" not in wanted and comparison.factor != "nfe":
            wanted = {**wanted, "nfe": first}
        for found in measured:
            cell, value = found.cell, found.value(plan.metric)
            if cell.experiment != experiment or not _matches(cell, wanted):
                continue
            key = level if level is not None else cell.factors[comparison.factor]
            groups.setdefault(key, [])
            seeds.setdefault(key, [])
            if value is not None:
                groups[key].append(value)
                seeds[key].append(cell.seed)
    return groups, seeds


def _picks(comparison: Comparison) -> list[tuple[str | None, dict[str, Any], str]]:
    """(level, wanted values, experiment): one of each group, or one for all levels of a factor."""
    if not comparison.groups:
        return [(None, dict(comparison.where), comparison.experiment)]
    return [
        (level, {**comparison.where, **{k: v for k, v in picked.items() if k != "experiment"}}, picked["experiment"])
        for level, picked in comparison.groups.items()
    ]


def _matches(cell: Cell, wanted: Mapping[str, Any]) -> bool:
    levels = {**cell.factors, "seed": str(cell.seed), "nfe": str(cell.nfe)}
    return all(levels.get(key) == label(value) for key, value in wanted.items())


def _level_rows(groups: Mapping[str, Sequence[float]], baseline: str | None) -> list[dict[str, Any]]:
    reference = groups.get(label(baseline) if baseline is not None else next(iter(groups), ""), ())
    base = float(np.mean(reference)) if len(reference) else math.nan
    rows: list[dict[str, Any]] = []
    for level, values in groups.items():
        if not values:
            rows.append({"level": level, "runs": 0, "mean": None, "sd": None, "low": None, "high": None, "ratio": None})
            continue
        mean, low, high, n = mean_interval(values)
        sd = float(np.std(values, ddof=1)) if n > 1 else None
        ends = {"low": low, "high": high} if n > 1 else {"low": None, "high": None}
        ratio = mean / base if base > 0 and mean > 0 else None
        rows.append({"level": level, "runs": n, "mean": mean, "sd": sd, **ends, "ratio": ratio})
    return rows


def _test(comparison: Comparison, groups: Mapping[str, Sequence[float]], blocks: Any) -> Compared:
    kind = comparison.test if comparison.test != "auto" else ("welch" if len(groups) <= 2 else "anova")
    if kind == "welch":
        found = welch(groups)
        first, second = groups
        effect = f"difference {interval_text(found.difference, found.low, found.high)}, Hedges' g "
        effect += interval_text(found.g, found.g_low, found.g_high)
        pair = Pair(first, second, found.difference, found.low, found.high, found.p)
        statistic = f"t({found.df:.1f}) = {found.t:.2f}"
        return Compared("", [], "Welch's t", statistic, found.p, effect=effect, pairs=[pair])
    table = anova(groups, blocks)
    effect = f"eta squared {interval_text(table.eta_squared, table.low, table.high)}"
    statistic = f"F({table.df_between}, {table.df_within}) = {table.f:.2f}"
    test = "ANOVA and Tukey's HSD" + (", seeds as blocks" if blocks else "")
    return Compared("", [], test, statistic, table.p, effect=effect, pairs=tukey(groups, blocks))


def _verdict(answer: Compared, better: str) -> str:
    """What a tested comparison comes to; a null result is said to be one."""
    assert answer.p is not None
    assert answer.p_holm is not None
    runs = " + ".join(str(row["runs"]) for row in answer.levels if row["runs"])
    numbers = f"{answer.statistic}, p = {p_text(answer.p)}, after Holm {p_text(answer.p_holm)}; {answer.effect}; "
    numbers += f"{runs} runs"
    if answer.null:
        text = f"No difference was found ({numbers}). The intervals show what remains possible."
    else:
        told = [pair for pair in answer.pairs if pair.p < ALPHA]
        text = f"There is a difference ({numbers}). " + ("; ".join(map(_said, told)) or "No single pair differs") + "."
    return answer.verdict + text + _best(answer.levels, better)


def _said(pair: Pair) -> str:
    side = "below" if pair.difference < 0 else "above"
    interval = interval_text(abs(pair.difference), *sorted((abs(pair.low), abs(pair.high))))
    return f"{pair.first} is {side} {pair.second} by {interval}"


def _best(levels: Sequence[Mapping[str, Any]], better: str) -> str:
    """Which level has the best mean, whatever a test says; "" for metrics that are to be equal to something."""
    pick: dict[str, Callable[..., Any]] = {"lower": min, "higher": max}
    known = [row for row in levels if row["mean"] is not None]
    if better not in pick or len(known) < 2:
        return ""
    best = pick[better](known, key=lambda row: row["mean"])
    return f" The best mean is that of {best['level']}: {format_number(best['mean'])}."
