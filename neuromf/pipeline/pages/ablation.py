"""The page of an ablation: what each question came to, every cell, and how the runs went."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neuromf import __version__
from neuromf.pipeline.ablation.folder import PLAN_FILE
from neuromf.pipeline.ablation.stages import Place
from neuromf.pipeline.pages.ablation_data import (
    Collected,
    by_evaluations,
    collected,
    levels,
    means,
    training_curves,
)
from neuromf.pipeline.pages.collected import Wanted, command, count
from neuromf.pipeline.pages.volumes import SYNTHETIC
from neuromf.reporting.page import (
    Block,
    Chart,
    Charts,
    Facts,
    Folded,
    Line,
    Missing,
    Page,
    Section,
    Table,
    Text,
    Tile,
)
from neuromf.reporting.paper_tables import p_text


def ablation_page(folder: Path, wanted: Wanted) -> Page:
    """Collect what an ablation's folder holds; what is not evaluated is said."""
    ablation = collected(folder)
    sections = [
        Section("questions", "Questions", _questions(ablation), _UNIT),
        Section("cells", "Cells", _cells(ablation), "Every run with every number of evaluations."),
        Section("curves", "Curves", _curves(ablation), "Of every run. Hover or touch, or use the arrow keys."),
        _provenance(ablation),
    ]
    missing = [cell for cell in ablation.cells if cell.get("missing")]
    lead = f"Metric: {ablation.plan.metric}. " + (f"{count(len(missing), 'cell')} not measured yet." if missing else "")
    return Page(
        "Ablation",
        ablation.plan.name,
        lead,
        _tiles(ablation),
        sections,
        f"Written by neuromf {__version__}. {SYNTHETIC}",
    )


_UNIT = (
    "The unit of every test is the run. Dots are runs, the thick dot is their mean with Student's 95 % interval; "
    "p-values of all questions are adjusted together (Holm)."
)


def _tiles(ablation: Collected) -> list[Tile]:
    cells = ablation.cells
    measured = sum(not cell.get("missing") for cell in cells)
    answers = ablation.results.get("comparisons", [])
    differ = sum(answer.get("p_holm") is not None and answer["p_holm"] < 0.05 for answer in answers)
    tested = sum(answer.get("p_holm") is not None for answer in answers)
    return [
        Tile("Cells measured", f"{measured} of {len(cells)}"),
        Tile("Runs", str(len({cell.get("run") for cell in cells}))),
        Tile("Differences found", f"{differ} of {tested}", "questions that could be tested"),
    ]


def _again(ablation: Collected) -> str:
    return command("ablate", ablation.folder / PLAN_FILE, "--out", ablation.folder, "--collect")


def _questions(ablation: Collected) -> list[Block]:
    if not ablation.results:
        return [Missing("Nothing is collected yet.", _again(ablation))]
    blocks: list[Block] = []
    if ablation.stale:
        text = f"{count(ablation.stale, 'evaluation')} newer than these tables."
        blocks.append(Missing(text, _again(ablation)))
    answers = ablation.results["comparisons"]
    if len(answers) != len(ablation.plan.comparisons):
        return [*blocks, Missing("The plan asks other questions than these tables answer.", _again(ablation))]
    for number, answer in enumerate(answers):
        blocks += [Text(str(answer["name"]), heading=True), Text(str(answer["verdict"]))]
        blocks += [Charts([_level_chart(ablation, number)]), Table(answer["levels"])]
        if len(answer.get("pairs", [])) > 1:
            blocks.append(Folded("All pairs (Tukey's HSD)", "\n".join(map(_pair, answer["pairs"]))))
    return blocks


def _pair(pair: Mapping[str, Any]) -> str:
    interval = f"[{pair['low']:.4g}, {pair['high']:.4g}]"
    return f"{pair['first']} - {pair['second']}: {pair['difference']:.4g} {interval}, p = {p_text(pair['p'])}"


def _level_chart(ablation: Collected, number: int) -> Chart:
    """Runs as dots beside the mean of each level with its interval."""
    found = levels(ablation, number)
    places = [n for n, level in enumerate(found) for _ in level.values]
    at, know = range(len(found)), any(level.low is not None for level in found)
    mean = Line(
        "mean",
        list(at),
        [level.mean for level in found],
        low=[level.low for level in found] if know else None,
        high=[level.high for level in found] if know else None,
        joined=False,
    )
    runs = Line("runs", places, [value for level in found for value in level.values], joined=False)
    comparison = ablation.plan.comparisons[number]
    names = [level.name for level in found]
    return Chart(
        ablation.plan.metric,
        [mean, *([runs] if places else [])],
        x_label=comparison.factor or "",
        x_names=names,
        wide=True,
    )


def _cells(ablation: Collected) -> list[Block]:
    if not ablation.cells:
        return [Missing("No cell is tabled yet.", _again(ablation))]
    heads = [head for head in ablation.cells[0] if any(cell.get(head) is not None for cell in ablation.cells)]
    return [Table([{head: cell.get(head) for head in heads} for cell in ablation.cells])]


def _curves(ablation: Collected) -> list[Block]:
    """Quality against the number of evaluations, and the training of every run."""
    charts = []
    models = by_evaluations(ablation, ablation.plan.metric)
    if models:
        lines = [Line(model, *means(values)) for model, values in models.items()]
        charts.append(
            Chart(
                f"{ablation.plan.metric} by evaluations", lines, log=True, x_label="evaluations", x_log=True, wide=True
            )
        )
    for title, figure in (("raw loss", "raw_loss_mean"), ("raw loss, validation", "val_raw_loss")):
        curves = training_curves(ablation, figure)
        if curves:
            charts.append(Chart(title, [Line(run, x, y) for run, (x, y) in curves.items()], log=True, wide=True))
    return [Charts(charts)] if charts else [Missing("No run has ended an epoch yet.")]


def _provenance(ablation: Collected) -> Section:
    plan = ablation.plan
    facts = {
        "plan": plan.name,
        "preset": plan.preset,
        "data": "invented heads" if plan.phantoms else plan.data,
        "volumes per cell": plan.sample.n,
        "compared with": str(plan.evaluate.real) if plan.evaluate.real else "held-back heads",
        "features": ", ".join(plan.evaluate.features) or "builtin",
        "runs": str(Place(ablation.folder).runs),
        "command": command("ablate", ablation.folder / PLAN_FILE, "--out", ablation.folder),
    }
    return Section("provenance", "Provenance", [Facts(facts), Folded("The plan in full", plan.to_yaml())])
