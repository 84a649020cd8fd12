"""The page of a generated set: its volumes, how they were made, and how good they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neuromf import __version__
from neuromf.pipeline.pages.collected import Wanted, command, part
from neuromf.pipeline.pages.metrics import evaluations, metric_blocks, overview
from neuromf.pipeline.pages.provenance import by, known, licence_of
from neuromf.pipeline.pages.volumes import SYNTHETIC, nifti_files, set_volumes
from neuromf.pipeline.sample_folder import MANIFEST, sample_indices
from neuromf.pipeline.volume_folder import REPORT
from neuromf.reporting.page import Block, Facts, Folded, Missing, Page, Section, Table, Text, Tile

VOLUMES = "volumes"


def set_folders(run: Path) -> list[Path]:
    """The folders of samples in a run folder and one level below it."""
    return sorted(path.parent for depth in ("*", "*/*") for path in run.glob(f"{depth}/{MANIFEST}"))


def not_evaluated(folder: Path, data: Mapping[str, Any]) -> Missing:
    """What is to be done with a folder of samples before there are metrics."""
    if not nifti_files(volumes_of(folder)):
        return Missing(f"{folder.name} is not decoded yet.", command("decode", folder))
    held_back = ("--latents", data["latents"]) if data.get("latents") else ()
    return Missing(f"{folder.name} is not evaluated yet.", command("evaluate", volumes_of(folder), "SCANS", *held_back))


def volumes_of(folder: Path) -> Path:
    """Where the volumes of a set lie: in its folder `volumes`, or in itself."""
    return folder / VOLUMES if (folder / VOLUMES).is_dir() else folder


def set_page(folder: Path, wanted: Wanted) -> Page:
    """Collect what a folder of samples, or of volumes, holds."""
    samples = folder if (folder / MANIFEST).is_file() or folder.name != VOLUMES else folder.parent
    manifest, volumes = wanted.mapping(samples / MANIFEST), volumes_of(folder)
    decoded = wanted.mapping(volumes / REPORT)
    found = evaluations(samples if manifest else folder, wanted)
    shown: list[Block] = []
    if nifti_files(volumes):
        shown += set_volumes(volumes, wanted)
    else:
        shown.append(Missing("These latents are not decoded yet.", command("decode", folder)))
    metrics: list[Block] = [overview(found)] if len(found) > 1 else []
    metrics += [block for evaluation in found for block in metric_blocks(evaluation, wanted, heading=len(found) > 1)]
    if not found:
        metrics.append(not_evaluated(samples if manifest else folder, {"latents": "LATENTS"}))
    sections = [
        Section("volumes", "Volumes", shown, "Drag in a plane, or move its slider; the subject's left is on the left."),
        Section("metrics", "Metrics", metrics, "Generated against real volumes, by `neuromf evaluate`."),
        Section("checks", "Checks", _checks(decoded, volumes), "What `neuromf decode` saw in each volume."),
        Section("provenance", "Provenance", _provenance(samples, manifest, decoded), "How these volumes were made."),
    ]
    name = f"{samples.resolve().parent.name}/{samples.resolve().name}" if manifest else folder.resolve().name
    tiles = _tiles(samples, volumes, manifest, decoded)
    return Page(
        "Generated set", name, _lead(manifest), tiles, sections, f"Written by neuromf {__version__}. {SYNTHETIC}"
    )


def _lead(manifest: Mapping[str, Any]) -> str:
    if not manifest:
        return "Volumes without a manifest of neuromf: how they were made is not known here."
    nfe = manifest.get("nfe")
    how = f"{nfe} network evaluation{'s' * (nfe != 1)} each"
    return f"{how}, by {manifest.get('objective')} ({manifest.get('solver')}), noise of seed {manifest.get('seed')}."


def _tiles(folder: Path, volumes: Path, manifest: Mapping[str, Any], decoded: Mapping[str, Any]) -> list[Tile]:
    tiles = [Tile("Volumes", f"{len(nifti_files(volumes)):,}")]
    if manifest:
        tiles.insert(0, Tile("Samples", f"{manifest.get('n') or len(sample_indices(folder)):,}"))
        tiles.append(Tile("Evaluations", str(manifest.get("nfe")), "of the network, each sample"))
    if "failed" in decoded:
        tiles.append(Tile("Failed the check", f"{len(decoded['failed']):,}", "all are written"))
    return tiles


def _checks(decoded: Mapping[str, Any], volumes: Path) -> list[Block]:
    if "failed" not in decoded:
        return [Missing(f"{volumes} has no {REPORT}: these volumes were not checked.")]
    failed = part(decoded, "failed")
    if not failed:
        return [Text("All volumes passed: finite, of plausible brightness, with one head.")]
    return [Table([{"volume": name, "found": reason} for name, reason in failed.items()])]


def _provenance(folder: Path, manifest: Mapping[str, Any], decoded: Mapping[str, Any]) -> list[Block]:
    if not manifest:
        return [Missing(f"{folder} has no {MANIFEST}: the model, the seed and the solver are not known.")]
    model, autoencoder = part(manifest, "model"), part(manifest, "autoencoder")
    facts = {
        "model": model.get("path"),
        "weights SHA-256": model.get("weights_sha256"),
        "update": model.get("update"),
        "average": model.get("ema"),
        "objective": manifest.get("objective"),
        "solver": manifest.get("solver"),
        "evaluations": manifest.get("nfe"),
        "seed": manifest.get("seed"),
        "condition": manifest.get("condition"),
        "latent shape": by(manifest.get("latent_shape")),
        "autoencoder": autoencoder.get("name"),
        "autoencoder SHA-256": autoencoder.get("sha256"),
        "autoencoder licence": licence_of({**autoencoder, **part(decoded, "autoencoder")}),
        "neuromf": manifest.get("neuromf"),
    }
    plain = {name: value for name, value in manifest.items() if name not in ("statistics", "affine")}
    return [Facts(known(facts)), Folded("Manifest", _listed(plain))]


def _listed(values: Mapping[str, Any], indent: str = "") -> str:
    lines = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{key}:", _listed(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {value}")
    return "\n".join(lines)
