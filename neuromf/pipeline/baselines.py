"""Who made a set of volumes: `baseline.yaml` beside them, or the manifest of `neuromf sample`.

baseline.yaml, of a peer whose volumes lie beside it, or whose numbers are cited:

    name: MAISI-v2
    nfe: 30
    seconds: 12.5              # a volume
    citation: "Guo et al. 2025, arXiv 0000.00000"
    metrics:                   # only where there are no volumes: what the citation says
      fid_radimagenet: 1.2

A list of such entries under `baselines:` is several rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from neuromf.errors import UserError
from neuromf.files import read_json
from neuromf.pipeline.sample_folder import MANIFEST

BASELINE = "baseline.yaml"
_KEYS = ("name", "nfe", "seconds", "citation", "metrics")
_EXAMPLE = "as in: name: MAISI-v2, nfe: 30, seconds: 12.5, citation: Guo 2025"


class Model(NamedTuple):
    """What made the volumes: its name, network evaluations and seconds a volume, and where it is described."""

    name: str
    nfe: int | None = None
    seconds: float | None = None
    citation: str | None = None


class Baseline(NamedTuple):
    """An entry of baseline.yaml; `metrics` are numbers that its citation gives."""

    model: Model
    metrics: dict[str, float]


def model_of(volumes: Path) -> Model:
    """Who made the volumes of a folder; its own name where nothing says it.

    Raises:
        UserError: a baseline.yaml that cannot be used, or of several models.
    """
    volumes = Path(volumes)
    folder = volumes if volumes.is_dir() else volumes.parent
    for place in (folder, folder.parent):
        if (place / BASELINE).is_file():
            entries = read_baselines(place / BASELINE)
            if len(entries) > 1:
                raise UserError(
                    f"{place / BASELINE} names {len(entries)} models, and volumes are made by one",
                    "give each model's volumes a folder with a baseline.yaml of its own",
                )
            return entries[0].model
    manifest = folder.parent / MANIFEST
    if manifest.is_file():
        made = read_json(manifest)
        return Model(folder.parent.parent.name or folder.parent.name, nfe=made.get("nfe"))
    named = folder.resolve()
    return Model(named.parent.name if named.name == "volumes" else named.name)


def read_baselines(path: Path) -> list[Baseline]:
    """The entries of a baseline.yaml.

    Raises:
        UserError: no YAML, an unknown key, or a value that is not allowed.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not readable YAML: {str(error).splitlines()[0]}", _EXAMPLE) from error
    entries = content.get("baselines", [content]) if isinstance(content, Mapping) else content
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, Mapping) for entry in entries):
        raise UserError(f"{path} names no model", _EXAMPLE)
    return [_baseline(path, entry) for entry in entries]


def _baseline(path: Path, entry: Mapping[str, Any]) -> Baseline:
    if unknown := sorted(set(entry) - set(_KEYS)):
        raise UserError(f"{path}: unknown {', '.join(map(str, unknown))}", f"known: {', '.join(_KEYS)}")
    name, citation = entry.get("name"), entry.get("citation")
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{path} has an entry without a name", _EXAMPLE)
    if citation is not None and not isinstance(citation, str):
        raise UserError(f"{path}, {name}: a citation is text", _EXAMPLE)
    nfe = _number(path, name, "nfe", entry.get("nfe"))
    if nfe is not None and (nfe < 1 or nfe != int(nfe)):
        raise UserError(f"{path}, {name}: nfe {nfe:g} is no number of network evaluations", "a whole number from 1")
    given = entry.get("metrics") or {}
    if not isinstance(given, Mapping):
        raise UserError(f"{path}, {name}: metrics are names with numbers", "as in: metrics: {fid_inception: 12.3}")
    metrics = {str(key): _number(path, name, str(key), value) for key, value in given.items()}
    seconds = _number(path, name, "seconds", entry.get("seconds"))
    model = Model(name.strip(), None if nfe is None else int(nfe), seconds, citation)
    return Baseline(model, {key: value for key, value in metrics.items() if value is not None})


def _number(path: Path, name: str, key: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{path}, {name}: {key} '{value}' is no number", _EXAMPLE)
    return float(value)
