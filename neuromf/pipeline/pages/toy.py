"""The page of `neuromf toy`: its gates, its table, its figure."""

from __future__ import annotations

from pathlib import Path

from neuromf import __version__
from neuromf.pipeline.pages.collected import PICTURE_BYTES, Wanted, command, part
from neuromf.reporting.page import Block, Facts, Missing, Page, Picture, Section, Table, Tile
from neuromf.reporting.sprites import embedded

TOY, FIGURE = "toy.json", "figure2.png"


def toy_page(folder: Path, wanted: Wanted) -> Page:
    """Collect what a toy found; its runs have pages of their own."""
    toy = wanted.mapping(folder / TOY)
    gates, rows = list(toy.get("gates", [])), list(toy.get("rows", []))
    figure: list[Block]
    if (folder / FIGURE).is_file():
        alt = "Losses, samples on the torus, and histograms of both angles"
        figure = [Picture(embedded(folder / FIGURE, PICTURE_BYTES), alt, f"{alt}.")]
    else:
        figure = [Missing(f"{FIGURE} is not there.", command("toy", "--out", folder))]
    runs = sorted(path.parent for path in folder.glob("*/config.yaml"))
    sections = [
        Section("figure", "What it learned", figure),
        Section("gates", "Gates", [_table(gates)], "Required ones decide; the others are reported."),
        Section("numbers", "Numbers", [_table(rows)], "Of each run, by the number of evaluations of the network."),
        Section("provenance", "Provenance", [Facts({**part(toy, "facts"), "folder": str(folder)})]),
        Section(
            "runs", "Runs", [Missing(f"{run.name} has a page of its own.", command("report", run)) for run in runs]
        ),
    ]
    passed = [gate for gate in gates if gate.get("required")]
    tile = Tile("Required gates passed", f"{sum(bool(gate.get('passed')) for gate in passed)} of {len(passed)}")
    verdict = "All required gates passed." if toy.get("passed") else "A required gate failed."
    return Page(
        "Toy", str(toy.get("problem", folder.name)), verdict, [tile], sections, f"Written by neuromf {__version__}."
    )


def _table(rows: list[dict[str, object]]) -> Block:
    return Table(rows) if rows else Missing("Nothing was written down.")
