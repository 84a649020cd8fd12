"""Anatomy in `evaluate`: volumes of structures of both sets, from a segmentation or from tables made elsewhere.

Both sets are segmented as they are compared: on the common grid and scale, so that what a grid of 3 mm does to a
segmentation it does to both. Segmentations are kept by the content of the volume and by the method.
"""

from __future__ import annotations

import json
import time
import zipfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import ndimage

from neuromf.data.label_maps import load_label_map
from neuromf.data.label_table import numbers_of
from neuromf.data.structure_tables import TOTAL, StructureTable, read_structure_table
from neuromf.data.volume_sets import VolumeSet, evenly
from neuromf.data.volumes import NIFTI_SUFFIXES, Volume, nifti_stem
from neuromf.errors import UserError
from neuromf.files import atomic_path, sha256_file, sha256_text
from neuromf.metrics import morphology
from neuromf.metrics.protocol import Record, mean_record, record
from neuromf.pipeline.evaluation_run import Run
from neuromf.pipeline.segmenters import METHODS, Anatomy, Segmenter, load_segmenter

PAIR = ("generated", "real")
_FORMAT = 1  # a higher number makes all kept segmentations be made anew
_TABLE_SUFFIXES = (".csv", ".tsv", ".txt")
_LABELLED = ("meshnet-18", "meshnet-18-small")
_ALPHA = 0.05
# Brains of people have 700 to 2200 ml; a real set far outside is of no whole heads, or on a wrong scale.
_PLAUSIBLE_ML = (600.0, 2500.0)
# Parts of a map that a network gives to a structure it knows.
_COUNTED_AS = {
    "cerebral white matter": ("white matter lesion",),
    "lateral ventricle": ("choroid plexus, lateral ventricle",),
    "inferior lateral ventricle": ("choroid plexus, inferior ventricle",),
}


class Morphology(NamedTuple):
    """What is asked for.

    Attributes:
        by: a method of `segmenters.METHODS`, or two tables of volumes, "GENERATED.csv,REAL.csv".
        limit: at most so many volumes of each set, evenly spread.
        labels: a folder of label maps (FreeSurfer numbers), named as the volumes they are of, for Dice.
    """

    by: str
    limit: int | None = None
    labels: Path | None = None

    @property
    def tables(self) -> tuple[Path, Path] | None:
        """The two tables, if that is what `by` names."""
        words = self.by.split(",")
        if len(words) == 2 and all(word.lower().endswith(_TABLE_SUFFIXES) for word in words):
            return Path(words[0]), Path(words[1])
        return None


def check_morphology(wanted: Morphology | None) -> None:
    """Refuse what cannot be measured, before anything is read.

    Raises:
        UserError: no such method, tables that are absent or no tables, or label maps without a segmentation.
    """
    if wanted is None:
        return
    if wanted.tables is not None:
        _both(*(read_structure_table(path) for path in wanted.tables))
    elif wanted.by not in METHODS:
        load_segmenter(wanted.by)  # says which there are
    if wanted.labels is not None and not Path(wanted.labels).is_dir():
        raise UserError(
            f"{wanted.labels} is no folder of label maps", "label maps are named as the volumes they are of"
        )
    if wanted.labels is not None and wanted.by not in _LABELLED:
        raise UserError(f"Dice is of {' and '.join(_LABELLED)}; {wanted.by} draws no such labels", "use one of them")


def measure_morphology(run: Run, wanted: Morphology | None) -> None:
    """Volumes, effect sizes, agreement of correlations and, with label maps, Dice; or the reason why not."""
    if wanted is None:
        methods = ", ".join(METHODS)
        run.results.not_computed["morphology"] = f"not asked for: --morphology {methods}, or GENERATED.csv,REAL.csv"
        return
    measured = run.results.reach("morphology", partial(_tables if wanted.tables else _segmented, run, wanted))
    if measured is None:
        return
    run.results.anatomy = measured.tables
    run.results.attempt("morphology", partial(_effects, run, measured))
    run.results.attempt("morphology_correlation_r", partial(_agreement, run, measured))
    if wanted.labels is not None:
        run.results.attempt("dice", partial(_dice, run, wanted.labels, measured))


def contribute_morphology(run: Run, wanted: Morphology | None) -> None:
    """Make this process's part of the segmentations, and no number."""
    if wanted is not None and wanted.tables is None:
        run.results.reach("morphology", partial(_segmented, run, wanted))


class _Measured(NamedTuple):
    """Volumes of structures by set, and how they were got; the kept segmentations by set and place in it."""

    tables: dict[str, StructureTable]
    about: dict[str, Any]
    classes: tuple[str, ...] = ()
    files: Mapping[str, Mapping[int, Path]] = MappingProxyType({})

    @property
    def names(self) -> list[str]:
        """The structures."""
        return [name for name in self.tables["real"].names if name != TOTAL]

    @property
    def pair(self) -> tuple[np.ndarray, np.ndarray]:
        """(N, S) and (M, S) in ml."""
        return self.tables["generated"].columns(self.names), self.tables["real"].columns(self.names)

    @property
    def counts(self) -> dict[str, int]:
        """Heads of each set."""
        return {name: len(table.subjects) for name, table in self.tables.items()}


# --- volumes to numbers ----------------------------------------------------------------------------------------------


def _effects(run: Run, measured: _Measured) -> dict[str, Record]:
    generated, real = measured.pair
    structures = morphology.compare_structures(generated, real, measured.names)
    run.results.details["morphology"] = [structure.to_dict() for structure in structures]
    effect = morphology.mean_absolute_effect(generated, real, seed=run.seed)
    common = {"n": measured.counts, "structures": len(structures)} | measured.about
    differing = float(sum(structure.ks_p_holm < _ALPHA for structure in structures))
    return {
        "morphology_effect": record(effect, "lower", **common)
        | {"expected": morphology.chance_effect(len(generated), len(real))},
        "morphology_structures_differing": {"value": differing, "low": None, "high": None, "better": "lower"} | common,
    }


def _agreement(run: Run, measured: _Measured) -> dict[str, Record]:
    generated, real = measured.pair
    agreed = record(morphology.correlation_agreement(generated, real), "higher")
    records = {"morphology_correlation_r": agreed | {"n": measured.counts} | measured.about}
    ceiling = morphology.correlation_baseline(real, seed=run.seed)
    if ceiling is not None:
        records["morphology_correlation_r_real_real"] = record(ceiling, "higher") | measured.about
    return records


# --- heads to volumes ------------------------------------------------------------------------------------------------


def _tables(run: Run, wanted: Morphology) -> _Measured:
    assert wanted.tables is not None
    tables = _both(*(read_structure_table(path) for path in wanted.tables))
    hashes = [sha256_file(path) for path in wanted.tables]
    run.results.details["segmentation"] = {"tables": [str(path) for path in wanted.tables], "sha256": hashes}
    return _Measured(tables, {"segmentation": "measured elsewhere", "weights_sha256": None})


def _both(generated: StructureTable, real: StructureTable) -> dict[str, StructureTable]:
    """Both tables by set, with the same structures in the same order.

    Raises:
        UserError: the tables name different structures.
    """
    if lone := sorted(set(generated.names) ^ set(real.names)):
        raise UserError(
            f"in one of the two tables of volumes only: {', '.join(lone[:5])}{', ...' if len(lone) > 5 else ''}",
            "measure both sets by the same program with the same options",
        )
    return {"generated": StructureTable(generated.subjects, real.names, generated.columns(real.names)), "real": real}


def _segmented(run: Run, wanted: Morphology) -> _Measured:
    segmenter = load_segmenter(wanted.by, run.device)
    files = {name: _segment(run, segmenter, name, evenly(range(len(run.sets[name])), wanted.limit)) for name in PAIR}
    about = {"segmentation": segmenter.name, "weights_sha256": segmenter.sha256}
    run.results.details["segmentation"] = about | {"how": segmenter.how, "of": str(run.sets["real"].grid)}
    if not run.share.main:
        return _Measured({}, about)
    tables = _both(*(_table(run.sets[name], files[name]) for name in PAIR))
    brain_ml = float(np.median(tables["real"].columns([n for n in tables["real"].names if n != TOTAL]).sum(1)))
    if not _PLAUSIBLE_ML[0] <= brain_ml <= _PLAUSIBLE_ML[1]:
        run.results.notes.append(
            f"the segmentation finds {brain_ml:.0f} ml of brain in the median real volume, where people have 700 to"
            " 2200: these are no whole heads, or the method does not fit them, and numbers of morphology mean nothing"
        )
    return _Measured(tables, about, segmenter.classes, files)


def _segment(run: Run, segmenter: Segmenter, name: str, chosen: Sequence[int]) -> dict[int, Path]:
    """Segment some volumes of a set, but those that are kept; where each is kept."""
    volumes = run.sets[name]
    identity = [_FORMAT, segmenter.name, segmenter.sha256, segmenter.how, list(volumes.grid.spacing_mm)]
    place = run.cache / f"{segmenter.name}-{sha256_text(json.dumps(identity))[:16]}"
    files = {i: place / f"{volumes.keys[i]}.npz" for i in chosen}
    part = run.part(f"segmentations by {segmenter.name}", segmenter.batch)
    missing = [i for i in chosen if part.mine(i) and _kept(files[i]) is None]
    done, slowest_s = len(chosen) - len(missing), 0.0
    for start in range(0, len(missing), segmenter.batch):
        began_s = time.perf_counter()
        some = missing[start : start + segmenter.batch]
        heads = [Volume(np.asarray(volumes.array[i][0]), volumes.affines[i], {}) for i in some]
        for i, anatomy in zip(some, segmenter(heads), strict=True):
            _keep(files[i], anatomy)
        done, slowest_s = done + len(some), max(slowest_s, time.perf_counter() - began_s)
        run.tell(f"{segmenter.name} of {name}", done, len(chosen))
    part.wait(list(files.values()), slowest_s)
    return files


def _keep(file: Path, anatomy: Anatomy) -> None:
    names, ml = list(anatomy.volumes_ml), np.array(list(anatomy.volumes_ml.values()))
    labels = {} if anatomy.labels is None else {"labels": anatomy.labels}
    with atomic_path(file) as temporary, temporary.open("wb") as handle:
        np.savez_compressed(handle, names=np.array(names), ml=ml, **labels)  # type: ignore[arg-type]


def _kept(file: Path) -> dict[str, float] | None:
    """The volumes of a kept segmentation; None if it is absent or damaged."""
    try:
        with np.load(file, allow_pickle=False) as content:
            return dict(zip(content["names"].tolist(), content["ml"].tolist(), strict=True))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _table(volumes: VolumeSet, files: Mapping[int, Path]) -> StructureTable:
    found = {i: _kept(file) for i, file in files.items()}
    heads = {i: anatomy for i, anatomy in found.items() if anatomy is not None}
    assert len(heads) == len(files), "segmentations were removed while they were used"
    names = list(next(iter(heads.values())))
    ml = np.array([[anatomy[name] for name in names] for anatomy in heads.values()])
    return StructureTable([nifti_stem(volumes.paths[i]) for i in heads], names, ml)


# --- Dice ------------------------------------------------------------------------------------------------------------


def _dice(run: Run, folder: Path, measured: _Measured) -> dict[str, Record]:
    """Mean over the structures of a head, then over the heads of a set that have a label map."""
    records: dict[str, Record] = {}
    for name, files in measured.files.items():
        maps = {i: _label_map(folder, run.sets[name].paths[i]) for i in files}
        rows = {i: _dice_of(run.sets[name], i, path, files[i], measured.classes) for i, path in maps.items() if path}
        if not rows:
            continue
        means = torch.tensor([float(np.mean(list(row.values()))) for row in rows.values()], dtype=torch.float64)
        records[f"dice_{name}"] = mean_record(means, "higher", seed=run.seed) | measured.about
        run.results.details[f"dice_{name}"] = {
            structure: float(np.mean([row[structure] for row in rows.values() if structure in row]))
            for structure in measured.classes
            if any(structure in row for row in rows.values())
        }
    if not records:
        raise UserError(
            f"no volume has a label map of its name in {folder}", "name them alike: anna.nii.gz for anna.nii.gz"
        )
    return records


def _label_map(folder: Path, volume: Path) -> Path | None:
    stem = nifti_stem(volume)
    return next((path for suffix in NIFTI_SUFFIXES if (path := folder / f"{stem}{suffix}").is_file()), None)


def _dice_of(volumes: VolumeSet, i: int, path: Path, file: Path, classes: Sequence[str]) -> dict[str, float]:
    """Dice by structure of the kept labels and a label map, which is brought to their grid by the nearest voxel."""
    with np.load(file, allow_pickle=False) as content:
        found = content["labels"]
    given = load_label_map(path)
    matrix = np.linalg.inv(given.affine) @ volumes.affines[i]
    near = ndimage.affine_transform(
        given.labels, matrix[:3, :3], matrix[:3, 3], output_shape=found.shape, order=0, mode="constant", cval=0
    )
    true = np.zeros(found.shape, dtype=np.uint8)
    for number, structure in enumerate(classes, 1):
        true[np.isin(near, numbers_of(structure, *_COUNTED_AS.get(structure, ())))] = number
    return {classes[n - 1]: value for n, value in morphology.dice(found, true, range(1, len(classes) + 1)).items()}
