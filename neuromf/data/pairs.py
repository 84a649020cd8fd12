"""Images with a mask each: which mask belongs to which image, and reading it on the image's grid.

Pairs come as two folders whose files are named alike, as a table with the columns `path` and `mask`, or as a BIDS
dataset with masks among its derivatives (`sub-01_label-lesion_mask.nii.gz`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from neuromf.data.bids import is_bids, nifti_below, parse_name
from neuromf.data.preprocessing import Preprocessing, crop_or_pad, resample
from neuromf.data.sources import Scan, Sources, some
from neuromf.data.volumes import Volume, load_volume, nifti_stem, spacing_of
from neuromf.errors import ScanError, UserError

MASK_COLUMN = "mask"
MASK_ENDING = "_label-lesion_mask"
"""What BIDS calls the file of a lesion's mask, after the name it shares with its image."""
MASK_SUFFIXES = ("mask", "roi", "dseg")
LESION = "lesion"
"""The label by which BIDS tells a lesion's mask from others."""
_OF_THE_MASK = ("label", "desc", "space", "res", "den")
_ENDINGS = re.compile(r"([-_](label-lesion|lesions?|masks?|roi|seg|dseg|labels?|T1w?|T2w?|FLAIR))+$", re.IGNORECASE)
_SHIFT_VOXELS = 0.1
_LISTED_VALUES = 6


class Pair(NamedTuple):
    """An image and the file of its mask."""

    scan: Scan
    mask: Path


class Pairs(NamedTuple):
    """What belongs together; `unmasked` images of a BIDS dataset have no mask and are left out."""

    pairs: list[Pair]
    unmasked: list[str]


def image_files(images: Path, masks: Path | None = None) -> list[Path]:
    """What `find_sources` is to be given: a folder, or its images alone where the masks lie below it."""
    if masks is None or not images.is_dir() or images.resolve() not in masks.resolve().parents or is_bids(images):
        return [images]
    return sorted(path for path in nifti_below(images) if masks.resolve() not in path.resolve().parents)


def find_pairs(sources: Sources, masks: str | Path | None = None) -> Pairs:
    """Find the mask of each image.

    Args:
        sources: the images.
        masks: a folder of masks; None takes a table's column `mask`, or the derivatives of a BIDS dataset.

    Raises:
        UserError: nowhere to look, an image or a mask without its partner, or several candidates for one image.
    """
    if masks is None and any(MASK_COLUMN in scan.covariates for scan in sources.scans):
        return Pairs(_listed(sources), [])
    strict = masks is not None or not sources.trees
    found = _candidates(_mask_files(sources, masks))
    scans = _by_key(sources.scans)
    orphans = [str(files[0]) for key, files in found.items() if key not in scans]
    unmasked = [scan.subject for key, scan in scans.items() if key not in found]
    if orphans and (strict or len(orphans) == len(found)):
        raise UserError(
            f"{len(orphans)} masks belong to no image: {some(orphans)}",
            f"a mask is named as its image, with `_label-lesion_mask` or `_mask` at the end; the images are"
            f" {some([scan.subject for scan in sources.scans], 3)}",
        )
    if unmasked and strict:
        raise UserError(
            f"{len(unmasked)} of {len(scans)} images have no mask: {some(unmasked)}",
            "add their masks, or give the images that have one alone",
        )
    return Pairs([Pair(scan, _only(found[key])) for key, scan in scans.items() if key in found], unmasked)


def load_mask(path: Path, image: Volume, labels: Sequence[int] = ()) -> np.ndarray:
    """Read a mask that lies on its image's grid.

    Args:
        path: of the mask; 0 outside, any other one value inside.
        image: whose mask it is.
        labels: the values that count, where the file has several (1 and 2 of a label map).

    Returns:
        (I, J, K) bool.

    Raises:
        ScanError: not readable, another grid, more than two values, or nothing marked.
    """
    volume = load_volume(path, constant=True)
    _check_grid(path, volume, image)
    values = np.unique(volume.array)
    if labels:
        mask = np.isin(np.rint(volume.array), labels)
        if not mask.any():
            raise ScanError(
                f"{path}: no voxel has the label {' or '.join(map(str, labels))}; its values are {_few(values)}",
                "name labels that it has",
            )
        return mask
    if len(values) > 2 or values[0] != 0:
        raise ScanError(
            f"{path}: holds {len(values)} values ({_few(values)}), a mask has 0 and one other",
            "say which labels count with --label 1,2; probabilities: threshold them first; a resampled mask: resample"
            " it with nearest neighbours",
        )
    if len(values) < 2:
        raise ScanError(
            f"{path}: the mask is empty: all of it is {values[0]:g}", "leave this pair out, or mark its lesion"
        )
    return volume.array > 0


def mask_on_grid(path: Path, mask: np.ndarray, affine: np.ndarray, record: Mapping[str, Any]) -> np.ndarray:
    """Bring a mask to the grid its image was brought to: a voxel counts where at least half of it is covered.

    Args:
        path: of its file, for messages.
        mask: (I, J, K) bool on the image's own voxels.
        affine: (4, 4) of these.
        record: of the image's preprocessing.

    Returns:
        (1, I, J, K) bool.

    Raises:
        ScanError: nothing is left of it.
    """
    spec = Preprocessing.from_dict(record["settings"])
    share, _ = resample(mask.astype(np.float32), affine, spec.spacing)
    i, j, k = record["crop_start"]
    box, _ = crop_or_pad(share, (i, j, k), spec.size)
    if not (box >= 0.5).any():
        voxel_ml = float(np.prod(spacing_of(np.asarray(record["affine"])))) / 1000
        inside_ml, whole_ml = float(box.sum()) * voxel_ml, float(share.sum()) * voxel_ml
        outside = inside_ml < 0.5 * whole_ml
        raise ScanError(
            f"{path}: nothing is left of the mask on the base's grid: "
            + (f"{whole_ml - inside_ml:.3g} of its {whole_ml:.3g} ml lie outside" if outside else "")
            + ("" if outside else f"its {whole_ml:.3g} ml fill no voxel of {voxel_ml:.3g} ml by half"),
            "leave this pair out, or take a base with a larger field of view or smaller voxels",
        )
    return (box >= 0.5)[None]


def _listed(sources: Sources) -> list[Pair]:
    """The pairs of a table with a column `mask`, relative to the table."""
    without = [scan.subject for scan in sources.scans if MASK_COLUMN not in scan.covariates]
    if without:
        raise UserError(
            f"{len(without)} rows have no '{MASK_COLUMN}': {some(without)}", "each row names an image and its mask"
        )
    home = sources.tables[0].path.parent
    pairs = [Pair(scan, home / Path(scan.covariates[MASK_COLUMN]).expanduser()) for scan in sources.scans]
    absent = [str(pair.mask) for pair in pairs if not pair.mask.exists()]
    if absent:
        raise UserError(f"{len(absent)} masks do not exist: {some(absent)}", "paths are relative to the table's folder")
    return pairs


def _mask_files(sources: Sources, masks: str | Path | None) -> list[Path]:
    folders = [Path(masks)] if masks is not None else [root / "derivatives" for root in sources.trees]
    if not folders:
        raise UserError(
            "the images came without masks",
            "say where they are with --masks FOLDER, or give a table with the columns path and mask",
        )
    missing = [folder for folder in folders if not folder.is_dir()]
    if missing:
        raise UserError(f"there is no folder of masks {missing[0]}", "say where the masks are with --masks FOLDER")
    files = sorted(path for folder in folders for path in nifti_below(folder))
    if masks is None:  # derivatives hold much else
        files = [path for path in files if (name := parse_name(path.name)) and name.suffix in MASK_SUFFIXES]
    if not files:
        raise UserError(
            f"{folders[0]} holds no mask", "masks are NIfTI files, in derivatives named sub-X_label-lesion_mask.nii.gz"
        )
    return files


def _key(path: Path, stem: str) -> str:
    """What an image and its mask have in common."""
    if name := parse_name(path.name):
        return "_".join(f"{key}-{label}" for key, label in name.entities.items() if key not in _OF_THE_MASK)
    return _ENDINGS.sub("", stem)


def _by_key(scans: Sequence[Scan]) -> dict[str, Scan]:
    found: dict[str, Scan] = {}
    for scan in scans:
        key = _key(scan.path, scan.subject)
        if key in found:
            raise UserError(
                f"{found[key].path} and {scan.path} would share a mask", "choose one kind of image with --suffix"
            )
        found[key] = scan
    return found


def _candidates(files: Sequence[Path]) -> dict[str, list[Path]]:
    """Masks by image; where several lie there, those labelled as lesions."""
    found: dict[str, list[Path]] = defaultdict(list)
    for path in files:
        found[_key(path, nifti_stem(path))].append(path)
    for key, several in found.items():
        lesions = [path for path in several if (n := parse_name(path.name)) and n.entities.get("label") == LESION]
        found[key] = lesions if len(several) > 1 and lesions else several
    return dict(found)


def _only(files: Sequence[Path]) -> Path:
    if len(files) > 1:
        raise UserError(
            f"one image has {len(files)} masks: {some([str(path) for path in files])}",
            "give the folder of one kind of mask with --masks, or a table with the columns path and mask",
        )
    return files[0]


def _check_grid(path: Path, mask: Volume, image: Volume) -> None:
    hint = "resample the mask onto its image with nearest neighbours: mri_convert -rt nearest --like IMAGE MASK OUT"
    if mask.array.shape != image.array.shape:
        shapes = (" x ".join(map(str, v.array.shape)) for v in (mask, image))
        raise ScanError(f"{path}: the mask has {next(shapes)} voxels, its image {next(shapes)}", hint)
    corners = np.stack(np.meshgrid(*[(0, n - 1) for n in mask.array.shape], [1], indexing="ij"), -1).reshape(-1, 4)
    apart_mm = float(np.linalg.norm((corners @ (mask.affine - image.affine).T)[:, :3], axis=1).max())
    if apart_mm > _SHIFT_VOXELS * min(spacing_of(image.affine)):
        raise ScanError(f"{path}: the mask lies up to {apart_mm:.3g} mm beside its image, by their headers", hint)


def _few(values: np.ndarray) -> str:
    shown = ", ".join(f"{value:.4g}" for value in values[:_LISTED_VALUES])
    return shown + (", ..." if len(values) > _LISTED_VALUES else "")
