"""The rows of a comparison: evaluations from their folders, and cited numbers from baseline.yaml."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neuromf.errors import UserError
from neuromf.files import read_json
from neuromf.metrics.protocol import Record
from neuromf.pipeline.baselines import BASELINE, Model, model_of, read_baselines
from neuromf.pipeline.evaluation_report import FORMAT, METRICS_FILE, VOLUMES_FILE

_PLACES = ("", "evaluation", "volumes/evaluation", "generated/volumes/evaluation")
# What of a record must agree for two numbers to be of one measure, and what it is called.
_OF_RECORD = {
    "extractor": "extractor",
    "weights_sha256": "weights",
    "features_preprocessing": "preparation for the extractor",
    "covariance": "estimate of the covariance",
    "kernel": "kernel",
    "bandwidth": "kernel bandwidth",
    "neighbours": "number of neighbours",
    "scales": "number of scales",
    "segmentation": "segmentation",
    "cutoff_cycles_per_mm": "cutoff",
}


@dataclass(frozen=True)
class Row:
    """A model's numbers.

    Attributes:
        name: of the model, made unique.
        content: its metrics.json; empty where numbers are `cited`.
        metrics: records by name.
        volumes: the table of single volumes, where there is one.
    """

    name: str
    model: Model
    metrics: dict[str, Record]
    content: dict[str, Any] = field(default_factory=dict)
    volumes: Path | None = None
    cited: bool = False

    @property
    def n(self) -> int | None:
        """Generated volumes."""
        return None if self.cited else self.content["sets"]["generated"]["n"]

    def counts(self, metric: str) -> Any:
        """N of a number."""
        return self.metrics[metric]["n"]

    def conditions(self, metric: str) -> dict[str, Any]:
        """What must be equal for a number to compare with another's, by what it is called."""
        entry, content = self.metrics[metric], self.content
        real = content["sets"]["real"]
        bandwidth = entry.get("bandwidth")
        own = {word: entry[key] for key, word in _OF_RECORD.items() if key in entry and key != "bandwidth"}
        return own | {
            "kernel bandwidth": None if bandwidth is None else round(bandwidth, 9),
            "real set": real.get("sha256") or [real["source"], real["n"]],
            "grid": content["grid"],
            "preprocessing": content["preprocessing"] if real["brought_to_grid"] else None,
            "cleaning of the real scans": content.get("cleaning"),
        }

    def values(self, metric: str) -> dict[str, dict[str, float]]:
        """Values of single volumes by set and content; several of one content are told apart by their number."""
        found: dict[str, dict[str, float]] = {}
        if self.volumes is None:
            return found
        with self.volumes.open(newline="", encoding="utf-8") as handle:
            for i, line in enumerate(csv.DictReader(handle)):
                if line.get(metric):
                    of = found.setdefault(line["set"], {})
                    key = line["content"]
                    of[key if key not in of else f"{key}-{i}"] = float(line[metric])
        return found

    def to_dict(self, metrics: Sequence[str]) -> dict[str, Any]:
        """Plain values."""
        kept = {name: self.metrics[name] for name in metrics if name in self.metrics}
        return {"name": self.name, "model": self.model._asdict(), "n": self.n, "cited": self.cited, "metrics": kept}


def read_rows(sources: Sequence[Path]) -> list[Row]:
    """All rows, in order.

    Raises:
        UserError: a source that holds neither an evaluation nor cited numbers.
    """
    rows: list[Row] = []
    for source in sources:
        for row in _rows_of(Path(source)):
            taken = {other.name for other in rows}
            name, number = row.name, 2
            while name in taken:
                name, number = f"{row.name} ({number})", number + 1
            rows.append(Row(name, row.model, row.metrics, row.content, row.volumes, row.cited))
    return rows


def _rows_of(source: Path) -> list[Row]:
    if source.suffix.lower() in (".yaml", ".yml"):
        return _cited(source)
    places = [source] if source.is_file() else [source / place / METRICS_FILE for place in _PLACES]
    for place in places:
        if place.is_file():
            return [_measured(place)]
    if (source / BASELINE).is_file():
        return _cited(source / BASELINE)
    raise UserError(
        f"{source} holds no evaluation ({METRICS_FILE}) and no {BASELINE}" if source.exists() else f"no {source}",
        "evaluate it first: neuromf evaluate GENERATED REAL; then name its folder",
    )


def _measured(path: Path) -> Row:
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT or "metrics" not in content:
        raise UserError(f"{path} is no result of `neuromf evaluate`", f"name a folder with its {METRICS_FILE}")
    recorded = content.get("model")
    model = Model(**recorded) if recorded else model_of(Path(content["sets"]["generated"]["source"]))
    volumes = path.parent / VOLUMES_FILE
    return Row(model.name, model, content["metrics"], content, volumes if volumes.is_file() else None)


def _cited(path: Path) -> list[Row]:
    rows = []
    for model, metrics in read_baselines(path):
        if not metrics:
            raise UserError(
                f"{path}: {model.name} has neither volumes that were evaluated nor cited numbers",
                "evaluate its volumes, or give its published numbers under metrics:",
            )
        if model.citation is None:
            raise UserError(f"{path}: the numbers of {model.name} are of unknown origin", "add citation: to its entry")
        records = {name: {"value": value, "low": None, "high": None, "n": None} for name, value in metrics.items()}
        rows.append(Row(f"{model.name} (cited)", model, records, cited=True))
    return rows
