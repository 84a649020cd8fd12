"""What `evaluate` writes: metrics.json (its schema is in docs/evaluation.md), metrics.md, tables, and pictures.

metrics.json, schema version 3: `format`, `schema_version`, `neuromf_version`, `model` {name, nfe, seconds, citation}
of what made the volumes, `settings` (seed, limit, level of the intervals), `grid` {size, spacing_mm}, `preprocessing`
(null: no volume needed any), `cleaning` (of real scans before it), `sets` by name {n, sha256, source, intensity_scale,
brought_to_grid, refused}, `autoencoder`, `extractors` by name {extractor, weights_sha256, features_preprocessing,
dimension, planes}, `metrics` by name (records, see `metrics.protocol`; those made with an extractor say which, with its
hash and preprocessing), `verdict`, `not_computed` {name: reason}, `details`, `notes`.

volumes.csv has a row for each generated and real volume, and a column for each metric with values of single volumes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch import Tensor

from neuromf import __version__
from neuromf.data.preprocessing import Preprocessing
from neuromf.data.structure_tables import TOTAL, StructureTable, write_structure_table
from neuromf.data.volume_sets import VolumeSet
from neuromf.errors import UserError
from neuromf.files import write_json, write_text
from neuromf.metrics.protocol import HISTOGRAM_EDGES, Record
from neuromf.pipeline.baselines import Model
from neuromf.reporting.anatomy import anatomy_figure
from neuromf.reporting.figures import comparison_sheet, histograms, spectrum_plot
from neuromf.reporting.tables import format_number, markdown_table, write_csv

FORMAT = "neuromf-metrics"
SCHEMA_VERSION = 3
METRICS_FILE, TABLE_FILE, VOLUMES_FILE = "metrics.json", "metrics.md", "volumes.csv"
SHOWN = 4
FEW = 2048
_STRUCTURE_COLUMNS = ("structure", "generated_ml", "real_ml", "g", "g_low", "g_high", "ks", "ks_p_holm")

T = TypeVar("T")


@dataclass
class Results:
    """What the measurements fill in.

    Attributes:
        metrics: records by name.
        not_computed: reasons for those that could not be made.
        values: of single volumes, by metric and set.
        anatomy: volumes of structures by set, where they were measured.
    """

    metrics: dict[str, Record] = field(default_factory=dict)
    not_computed: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    extractors: dict[str, Any] = field(default_factory=dict)
    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    anatomy: dict[str, StructureTable] = field(default_factory=dict)

    def add(self, records: Mapping[str, Record]) -> None:
        """Add records; their values of single volumes are kept apart."""
        for name, entry in records.items():
            values = entry.get("values", {})
            if values:
                self.values[name] = {of: [float(v) for v in x] for of, x in values.items()}
            self.metrics[name] = {key: value for key, value in entry.items() if key != "values"}

    def attempt(self, name: str, measure: Callable[[], Mapping[str, Record]]) -> None:
        """Add the records `measure` returns; if the data do not allow it, the reason under `name`."""
        self.add(self.reach(name, measure) or {})

    def reach(self, name: str, step: Callable[[], T]) -> T | None:
        """What a step returns; None if it cannot be done, with the reason under `name`."""
        try:
            return step()
        except UserError as error:
            self.not_computed[name] = str(error).replace("\n", "; ")
            return None


@dataclass(frozen=True)
class EvaluateReport:
    """The result of `evaluate`.

    Attributes:
        content: what `metrics.json` holds.
        json, markdown: its files; figures: the PNG files.
        refused: files of any set that could not be used.
    """

    content: dict[str, Any]
    json: Path
    markdown: Path
    figures: list[Path]
    refused: list[dict[str, str]]

    @property
    def metrics(self) -> dict[str, Record]:
        """Records by name: `report.metrics["frechet_builtin"]["value"]`."""
        return self.content["metrics"]

    @property
    def rows(self) -> list[dict[str, str]]:
        """The table: metric, value, interval, N, better."""
        return table_rows(self.metrics)


class Plots(NamedTuple):
    """Arrays the pictures need: shell frequencies, spectra (N, F) per set, histogram densities per set."""

    frequency: Tensor
    power: dict[str, Tensor]
    densities: dict[str, list[float]]


class Settings(NamedTuple):
    """What the numbers depend on besides the volumes; `cleaning` is of real scans, `model` what made the others."""

    autoencoder: str
    sha256: str
    seed: int
    limit: int | None
    preprocessing: Preprocessing | None
    cleaning: dict[str, Any] | None
    model: Model


def write_report(
    out: Path, sets: dict[str, VolumeSet], results: Results, plots: Plots, settings: Settings
) -> EvaluateReport:
    """Write tables and pictures, then metrics.md and, last, metrics.json: where it lies, all of it is there."""
    figures = _draw(out, sets, plots, results)
    write_csv(list(_volume_rows(sets, results.values)), out / VOLUMES_FILE)
    for name, table in results.anatomy.items():
        write_structure_table(out / f"morphology_{name}.csv", table.subjects, table.names, table.ml)
    content = _content(sets, results, settings)
    write_text(out / TABLE_FILE, _markdown(content))
    write_json(out / METRICS_FILE, content)
    refused = [entry for volume_set in sets.values() for entry in volume_set.refused]
    return EvaluateReport(content, out / METRICS_FILE, out / TABLE_FILE, figures, refused)


def _volume_rows(
    sets: dict[str, VolumeSet], values: Mapping[str, Mapping[str, list[float]]]
) -> Iterator[dict[str, str | float | None]]:
    """One row per generated and real volume."""
    for name in ("generated", "real"):
        for i, (path, key) in enumerate(zip(sets[name].paths, sets[name].keys, strict=True)):
            cells = {metric: of[name][i] if name in of else None for metric, of in values.items()}
            yield {"set": name, "volume": path.name, "content": key, **cells}


def table_rows(metrics: dict[str, Record]) -> list[dict[str, str]]:
    """One line of text per record: metric, value, 95 % interval, N, better."""
    rows = []
    for name, entry in metrics.items():
        interval = ""
        if entry.get("low") is not None:
            interval = f"{format_number(entry['low'])} to {format_number(entry['high'])}"
        n = entry["n"]
        counts = " / ".join(str(v) for v in n.values()) if isinstance(n, dict) else str(n)
        label = f"{name} (shrunk)" if entry.get("covariance") == "shrunk" else name
        rows.append(
            {
                "metric": label,
                "value": format_number(entry["value"]),
                "interval": interval,
                "N": counts,
                "better": entry["better"],
            }
        )
    return rows


def _content(sets: dict[str, VolumeSet], results: Results, settings: Settings) -> dict[str, Any]:
    grid = sets["generated"].grid
    spec = settings.preprocessing.to_dict() if settings.preprocessing is not None else {}
    moved = any(s.resampled or "percentiles" in s.scales for s in sets.values())
    return {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "neuromf_version": __version__,
        "model": settings.model._asdict(),
        "settings": {"seed": settings.seed, "limit": settings.limit, "interval_level": 0.95},
        "grid": {"size": list(grid.size), "spacing_mm": list(grid.spacing_mm)},
        "preprocessing": spec | {"size": list(grid.size), "spacing_mm": list(grid.spacing_mm)} if moved else None,
        "cleaning": settings.cleaning,
        "sets": {name: {"source": _source(s.paths)} | s.describe() for name, s in sets.items()},
        "autoencoder": {"name": settings.autoencoder, "sha256": settings.sha256},
        "extractors": results.extractors,
        "metrics": results.metrics,
        "verdict": _verdict(results.metrics),
        "not_computed": results.not_computed,
        "details": results.details,
        "notes": results.notes,
    }


def _markdown(content: dict[str, Any]) -> str:
    counts = ", ".join(f"{s['n']} {name}" for name, s in content["sets"].items())
    size = " x ".join(str(n) for n in content["grid"]["size"])
    spacing = " x ".join(format_number(float(s)) for s in content["grid"]["spacing_mm"])
    lines = [
        "# Evaluation",
        "",
        f"Volumes: {counts}; {size} voxels of {spacing} mm.",
        "",
        *(_extractor_line(entry, content["autoencoder"]) for entry in content["extractors"].values()),
        "",
        markdown_table(table_rows(content["metrics"])),
        "",
        *_anatomy_lines(content["details"]),
        *([f"Verdict by `{verdict['metric']}`: {verdict['text']}.", ""] if (verdict := content["verdict"]) else []),
        "Interval: 95 %; of `_equal_n` and `_real_real` the spread over random halves. N: generated / real, or"
        " volumes / pairs. `equal`: compare with the row of the real set.",
    ]
    lines += ["", *(f"Note: {note}." for note in content["notes"])] if content["notes"] else []
    lines += ["", "Not computed:", "", *(f"- {k}: {v}" for k, v in content["not_computed"].items())]
    refused = [entry for s in content["sets"].values() for entry in s["refused"]]
    if refused:
        lines += ["", "Refused volumes:", "", *(f"- {entry['reason']}" for entry in refused)]
    return "\n".join(lines) + "\n"


def _anatomy_lines(details: Mapping[str, Any]) -> list[str]:
    if "morphology" not in details:
        return []
    of = details["segmentation"]
    how = f"`{of['segmentation']}`, {of['how']}" if "how" in of else f"tables {' and '.join(of['tables'])}"
    return [
        f"Anatomy by {how}. g: Hedges' standardised difference, generated less real, with its interval; ks:"
        " Kolmogorov-Smirnov, its p adjusted for all structures (Holm).",
        "",
        markdown_table(details["morphology"], _STRUCTURE_COLUMNS),
        "",
    ]


def _verdict(metrics: dict[str, Record]) -> dict[str, Any] | None:
    """What the first kernel distance says, which unlike a Frechet distance is unbiased; None where there is none."""
    found = next((name for name in metrics if name.startswith("kid_")), None)
    if found is None:
        return None
    entry = metrics[found]
    if entry["low"] > 0:
        text = "the sets differ: 0 lies below the interval"
    else:
        text = "no difference was seen: 0 lies within the interval, or above it"
    if min(entry["n"].values()) < FEW:
        text += f"; below {FEW} volumes a Frechet distance is dominated by its bias, and is read beside real-real only"
    return {"metric": found, "differ": bool(entry["low"] > 0), "text": text}


def _extractor_line(entry: dict[str, Any], autoencoder: dict[str, str]) -> str:
    of = f", the encoder of `{autoencoder['name']}`; no FID" if entry["extractor"] == "builtin" else ""
    return (
        f"- Features `{entry['extractor']}`{of}: {entry['dimension']} numbers, sha256 {entry['weights_sha256'][:12]};"
        f" {entry['features_preprocessing']}."
    )


def _draw(out: Path, sets: dict[str, VolumeSet], plots: Plots, results: Results) -> list[Path]:
    """The sheet of samples, the spectra, the histograms; the closest pairs and the anatomy where there are any."""
    spacing = sets["generated"].grid.spacing_mm
    order = ("real", "generated")
    rows = {name: list(sets[name].array[:SHOWN]) for name in order}
    figures = [
        comparison_sheet(rows, out / "samples.png", spacing_mm=spacing),
        spectrum_plot(plots.frequency, {name: plots.power[name] for name in order}, out / "spectrum.png"),
        histograms({name: plots.densities[name] for name in order}, out / "intensity.png", bins=HISTOGRAM_EDGES),
    ]
    for kind in ("pixels", "builtin"):
        pairs = results.details.get(f"closest_{kind}", [])[:SHOWN]
        if pairs:
            figures.append(_draw_pairs(out / f"closest_{kind}.png", sets, pairs))
    return [*figures, *_draw_anatomy(out / "morphology.png", results)]


def _draw_anatomy(path: Path, results: Results) -> list[Path]:
    if "morphology" not in results.details:
        return []
    names = [name for name in results.anatomy["real"].names if name != TOTAL]
    agreed = results.metrics.get("morphology_correlation_r")
    said = "" if agreed is None else f"Correlations agree by r = {agreed['value']:.2f}"
    generated, real = (results.anatomy[name].columns(names) for name in ("generated", "real"))
    return [anatomy_figure(path, names, generated, real, agreement=said)]


def _draw_pairs(path: Path, sets: dict[str, VolumeSet], pairs: list[dict[str, Any]]) -> Path:
    """Each generated volume above its nearest training volume, mirrored the way that brought them closest."""
    generated, train = [], []
    for pair in pairs:
        i, j = pair["index"]
        volume = sets["generated"].array[i]
        generated.append(np.flip(volume, 1) if pair["mirrored"] else volume)
        train.append(sets["train"].array[j])
    distances = ", ".join(format_number(float(pair["distance"])) for pair in pairs)
    return comparison_sheet(
        {"generated": generated, "nearest in training": train},
        path,
        spacing_mm=sets["generated"].grid.spacing_mm,
        heading=f"Closest pairs; distances {distances}",
    )


def _source(paths: list[Path]) -> str:
    """The folder the files have in common."""
    return os.path.commonpath([path.parent for path in paths])
