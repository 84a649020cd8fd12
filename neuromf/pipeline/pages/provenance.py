"""Where a run comes from: the command, the versions, the data, the autoencoder with its licence, the settings."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neuromf.files import sha256_file
from neuromf.models.autoencoder import BUILTIN_LICENCE, BUILTIN_WEIGHTS
from neuromf.pipeline.pages.collected import Wanted, part
from neuromf.pipeline.run_folder import CONFIG_FILE
from neuromf.reporting.page import Block, Facts, Folded, Missing, Section
from neuromf.training import checkpoint
from neuromf.weights import recognise


def provenance(run: Path, environment: Mapping[str, Any], data: Mapping[str, Any], wanted: Wanted) -> Section:
    """What it would take to make the run again."""
    blocks: list[Block] = []
    if environment:
        blocks.append(Facts(_origin(environment)))
    else:
        blocks.append(Missing(f"{run} has no environment.json: versions and the command are not known."))
    if data:
        blocks.append(Facts(_data(data)))
    weights = _weights(run, wanted)
    blocks += [Facts(weights)] if weights else [Missing("No checkpoint yet.")]
    config = run / CONFIG_FILE
    if config.is_file():
        blocks.append(Folded("All settings (config.yaml)", config.read_text(encoding="utf-8", errors="replace")))
    packages = part(environment, "packages")
    if packages:
        blocks.append(Folded("Versions", "\n".join(f"{name} {version}" for name, version in packages.items())))
    return Section("provenance", "Provenance", blocks, "What it would take to make this again.")


def _origin(environment: Mapping[str, Any]) -> dict[str, Any]:
    words = environment.get("command")
    facts = {
        "command": shlex.join(map(str, words)) if isinstance(words, list) else words,
        "started": environment.get("started"),
        "neuromf": environment.get("neuromf"),
        "revision": environment.get("git_revision"),
        "device": environment.get("cuda") or environment.get("device"),
        "processes": environment.get("processes"),
        "seed": environment.get("seed"),
        "platform": environment.get("platform"),
        "python": environment.get("python"),
    }
    return known(facts)


def known(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Those that have a value."""
    return {name: value for name, value in facts.items() if value not in (None, "")}


def _data(data: Mapping[str, Any]) -> dict[str, Any]:
    subjects, prepared, autoencoder = (part(data, key) for key in ("subjects", "preprocessing", "autoencoder"))
    facts = {
        "latents": data.get("latents"),
        "subjects": ", ".join(f"{n} {split}" for split, n in subjects.items()),
        "split hash": data.get("split_hash"),
        "data digest": data.get("digest"),
        "latent shape": by(data.get("latent_shape")),
        "volumes": f"{by(prepared.get('size'))} voxels of {by(prepared.get('spacing_mm'))} mm" if prepared else None,
        "autoencoder": autoencoder.get("name"),
        "autoencoder SHA-256": autoencoder.get("sha256"),
        "autoencoder licence": licence_of(autoencoder),
    }
    return known(facts)


def licence_of(autoencoder: Mapping[str, Any]) -> str:
    """The licence of an autoencoder's weights: as recorded, or as it is known by their name or hash."""
    recorded, digest, name = (str(autoencoder.get(key) or "") for key in ("licence", "sha256", "name"))
    if recorded:
        return recorded
    if name in ("identity", "haar", "haar2"):
        return "none needed: it has no weights"
    if digest and digest == sha256_file(BUILTIN_WEIGHTS):
        return BUILTIN_LICENCE
    known = recognise(name, digest) if digest else None
    return str(known.licence) if known else "not known: weights of the user's own, or not in the catalogue"


def _weights(run: Path, wanted: Wanted) -> dict[str, Any]:
    folder = max((run / checkpoint.FOLDER).glob("step_*"), default=None)
    if folder is None:
        return {}
    recorded = wanted.mapping(folder / "checkpoint.json")
    digests = {f"{name} SHA-256": digest for name, digest in part(recorded, "sha256").items() if name != "state.pt"}
    return {"checkpoint": f"{folder.name}, update {recorded.get('update')}", **digests}


def by(values: Any) -> str:
    """A shape or a spacing, as people write it."""
    if not isinstance(values, list):
        return "" if values is None else str(values)
    shown = [f"{value:g}" if isinstance(value, int | float) else str(value) for value in values]
    return shown[0] if len(set(shown)) == 1 and len(shown) == 3 and "." in shown[0] else " x ".join(shown)
