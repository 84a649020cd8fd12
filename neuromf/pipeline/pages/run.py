"""The page of a training run: how it went, what is wrong, what it makes, how good that is, where it comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neuromf import __version__
from neuromf.errors import UserError
from neuromf.pipeline.diagnose import gather, panels
from neuromf.pipeline.pages.collected import Wanted, command, count
from neuromf.pipeline.pages.generated import not_evaluated, set_folders
from neuromf.pipeline.pages.metrics import evaluations, metric_blocks, overview
from neuromf.pipeline.pages.provenance import provenance
from neuromf.pipeline.pages.volumes import SYNTHETIC, run_volumes
from neuromf.pipeline.run_folder import DATA_FILE, ENVIRONMENT_FILE, RESULT_FILE
from neuromf.reporting.diagnosis import Panel
from neuromf.reporting.page import Block, Chart, Charts, Line, Missing, Page, Problem, Section, Text, Tile
from neuromf.reporting.tables import format_number
from neuromf.training import diagnosis
from neuromf.training.diagnosis import Diagnosis
from neuromf.training.diagnosis_evidence import Evidence, finite

FOOT = f"Written by neuromf {__version__}. {SYNTHETIC}"
_PARTS_OF_TIME = ("[0, 0.2)", "[0.2, 0.4)", "[0.4, 0.6)", "[0.6, 0.8)", "[0.8, 1]")


def run_page(run: Path, wanted: Wanted) -> Page:
    """Collect what a run folder holds; what is not there is said on the page."""
    environment, data = wanted.mapping(run / ENVIRONMENT_FILE), wanted.mapping(run / DATA_FILE)
    result = wanted.mapping(run / RESULT_FILE)
    try:
        evidence, remarks = gather(run)
    except UserError as error:
        findings: list[Block] = [Missing(f"{error.message}.", error.hint)]
        curves, lead, tiles = list(findings), "No epoch has ended yet.", list[Tile]()
    else:
        wanted.remarks += remarks
        found = diagnosis.diagnose(evidence)
        findings, curves = _findings(found), [Charts(_charts(evidence))]
        lead, tiles = _lead(found, result, evidence), _tiles(evidence, result)
    sections = [
        Section("findings", "Findings", findings, "What `neuromf diagnose` sees in the figures of all epochs."),
        Section("curves", "Curves", curves, _CURVES),
        Section("samples", "Samples", run_volumes(run, data, wanted), _SAMPLES),
        Section(
            "metrics", "Metrics", _metrics(run, data, wanted), "Generated against real volumes, by `neuromf evaluate`."
        ),
        provenance(run, environment, data, wanted),
    ]
    return Page("Training run", run.resolve().name, lead, tiles, sections, FOOT)


_CURVES = (
    "One point for each epoch. The raw loss comes first: the weighted one stays near a constant whatever happens. "
    "Hover or touch a chart, or move in it by the arrow keys; a name below it hides its curve."
)
_SAMPLES = "Noise that never changes, decoded. Drag in a plane, or move its slider; the subject's left is on the left."


def _lead(found: Diagnosis, result: Mapping[str, Any], evidence: Evidence) -> str:
    state = "Finished" if result else "Ended by a guard" if evidence.halted else "Not finished"
    return f"{state}; {found.phase.name} phase: {found.phase.judged_by}."


def _tiles(evidence: Evidence, result: Mapping[str, Any]) -> list[Tile]:
    tiles = []
    if evidence.updates is not None:
        planned = f"of {evidence.planned:,} planned" if evidence.planned else count(len(evidence.epochs), "epoch")
        tiles.append(Tile("Updates", f"{evidence.updates:,}", planned))
    raw, validated = evidence.series("raw_loss_mean"), evidence.series("val_raw_loss")
    if raw:
        tiles.append(Tile("Raw loss", format_number(raw.values[-1]), f"epoch {raw.epochs[-1]:,}"))
    if validated:
        best = min(zip(validated.values, validated.epochs, strict=True))
        tiles.append(Tile("Validation, best", format_number(best[0]), f"raw loss, epoch {best[1]:,}"))
    cosine = evidence.series("cosine_sim_V_vc")
    if cosine:
        tiles.append(Tile("Cosine of V with v", format_number(cosine.values[-1], 3), "1 points the right way"))
    epochs = evidence.series("epoch_time_sec")
    seconds = finite(result.get("seconds"))
    if seconds is not None:
        tiles.append(Tile("Time", _duration(seconds), "of the last call"))
    elif epochs:
        tiles.append(Tile("Time", _duration(sum(epochs.values)), "in updates"))
    return tiles


def _duration(seconds: float) -> str:
    """Time as people say it.

    Example:
        >>> _duration(287), _duration(40_000)
        ('4 min 47 s', '11 h 6 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _findings(found: Diagnosis) -> list[Block]:
    if not found.findings:
        return [Text("Nothing was found: no figure is beyond its limit.")]
    return [Problem(f.severity, f.title, [str(n) for n in f.numbers], f.why, f.setting) for f in found.findings]


# --- curves -----------------------------------------------------------------------------------------------------


def _charts(evidence: Evidence) -> list[Chart]:
    """The panels of a diagnosis, the first over the whole width, and what has no place in one picture."""
    first, *rest = [panel for panel in panels(evidence) if panel.series]
    more = [_by_time(evidence), _weights(evidence)]
    return [_chart(first, wide=True), *map(_chart, rest), *(_chart(panel) for panel in more if panel.series)]


def _chart(panel: Panel, wide: bool = False) -> Chart:
    lines = [Line(name, x, y) for name, (x, y) in panel.series.items()]  # type: ignore[arg-type]
    levels = {name or f"{level:g}": level for name, level in panel.levels.items()}
    return Chart(panel.title, lines, panel.log, levels, wide=wide)


def _by_time(evidence: Evidence) -> Panel:
    """The raw loss in five parts of [0, 1]."""

    def part_of(n: int) -> Any:
        def value(summary: Mapping[str, Any]) -> float | None:
            parts = summary.get("raw_loss_by_t")
            return finite(parts[n]) if isinstance(parts, Sequence) and n < len(parts) else None

        return value

    series = {name: evidence.computed(name, part_of(n)) for n, name in enumerate(_PARTS_OF_TIME)}
    return Panel("raw loss by t", {f"t in {n}": (s.epochs, s.values) for n, s in series.items() if s}, log=True)


def _weights(evidence: Evidence) -> Panel:
    names = {"size of an update": "relative_update_norm", "distance of the average": "ema_divergence"}
    series = {name: evidence.series(path) for name, path in names.items()}
    return Panel("weights, relative", {n: (s.epochs, s.values) for n, s in series.items() if s}, log=True)


# --- metrics ----------------------------------------------------------------------------------------------------


def _metrics(run: Path, data: Mapping[str, Any], wanted: Wanted) -> list[Block]:
    """Every evaluation below the run; and what was generated and not evaluated, with the command."""
    found = evaluations(run, wanted)
    blocks: list[Block] = [overview(found)] if len(found) > 1 else []
    blocks += [block for evaluation in found for block in metric_blocks(evaluation, wanted)]
    sets = set_folders(run)
    blocks += [not_evaluated(folder, data) for folder in sets if not any(folder in e.folder.parents for e in found)]
    if not sets and not found:
        blocks.append(Missing("Nothing was generated yet.", command("sample", run, "--n", 64, "--decode")))
    return blocks
