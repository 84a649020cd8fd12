"""One scan looked at as `encode` would: what it is, what would be done to it, or why it cannot be used.

No torch here: the worker processes of a check start in a second and stay small.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import nibabel as nib
import numpy as np

from neuromf.data.preprocessing import Preprocessing, preprocess
from neuromf.data.sources import Scan
from neuromf.data.volumes import load_volume, spacing_of
from neuromf.errors import ScanError
from neuromf.pipeline.skull_strip import PLAUSIBLE_ML

# Angles below these come from rounding in headers.
_SHEAR_DEG, _FORMS_DEG = 0.5, 1.0
_MUCH_LOST = 0.01
_MAX_COUNTED_VOXELS = 2**27


@dataclass(frozen=True)
class ScanCheck:
    """What was found of one scan; the geometry is that of the file, before anything is done to it.

    Attributes:
        verdict: used on its own grid; changed in geometry (`changes`) and used; refused (`reason`, `hint`).
        changes: the steps of preprocessing that do something.
        notes: what a careful reader should look at although the scan can be used.
        oblique_deg: largest angle between a voxel axis and its world axis; shear_deg: departure of the voxel axes
            from right angles.
        non_finite_share: of the voxels, NaN or Inf; None where they could not be read.
        foreground_lost: share of the head outside the box; cropped, padded: voxels per axis at the final spacing.
        content: hash of the RAS voxels, equal for the same image in another orientation, type or compression.
    """

    subject: str
    participant: str
    path: str
    verdict: Literal["used", "changed", "refused"]
    reason: str = ""
    hint: str = ""
    changes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    orientation: str = ""
    shape: tuple[int, ...] = ()
    spacing_mm: tuple[float, ...] = ()
    dtype: str = ""
    oblique_deg: float | None = None
    shear_deg: float | None = None
    non_finite_share: float | None = None
    foreground_lost: float | None = None
    cropped: tuple[int, ...] = ()
    padded: tuple[int, ...] = ()
    content: str = ""


def check_scan(scan: Scan, spec: Preprocessing) -> ScanCheck:
    """Read a scan and prepare it as `encode` would, and tell what was found. Memory: one scan."""
    known: dict[str, Any] = {"subject": scan.subject, "participant": scan.participant, "path": str(scan.path)}
    if scan.fault is not None:
        return ScanCheck(**known, verdict="refused", reason=scan.fault.reason, hint=scan.fault.hint)
    image = _header(scan)
    known |= _geometry(image) if image is not None else {}
    try:
        volume = load_volume(scan.path)
        prepared = preprocess(volume, spec)
    except ScanError as error:
        reason = error.message.removeprefix(f"{scan.path}: ")
        share = _non_finite_share(image) if image is not None else None
        return ScanCheck(**known, verdict="refused", reason=reason, hint=error.hint, non_finite_share=share)
    record = prepared.record
    changes, cropped, padded = _changes(record)
    notes = (*(_header_notes(image) if image is not None else ()), *scan_notes(record))
    content = hashlib.blake2b(str(volume.array.shape).encode() + volume.array.tobytes(), digest_size=16)
    return ScanCheck(
        **known,
        verdict="changed" if changes else "used",
        changes=changes,
        notes=notes,
        non_finite_share=0.0,
        foreground_lost=record["foreground_lost"],
        cropped=cropped,
        padded=padded,
        content=content.hexdigest(),
    )


def scan_notes(record: Mapping[str, Any]) -> tuple[str, ...]:
    """What a careful reader should know of a prepared scan (`Prepared.record`) although it can be used."""
    notes = []
    if record["source"]["orientation_from"] == "none":
        notes.append("the header states no orientation (sform and qform codes are 0): left and right are a guess")
    _, shear = angles_of(np.asarray(record["source"]["affine"]))
    if shear > _SHEAR_DEG:
        notes.append(f"sheared: the voxel axes miss right angles by {shear:.1f} degrees, which distorts the head")
    if record["foreground_lost"] > _MUCH_LOST:
        notes.append(f"the crop loses {record['foreground_lost']:.1%} of the head: a larger size keeps it")
    brain = record.get("skull_strip")
    if brain is not None and not PLAUSIBLE_ML[0] <= brain["brain_ml"] <= PLAUSIBLE_ML[1]:
        notes.append(f"suspicious: the brain found measures {brain['brain_ml']:.0f} ml: look at its mask")
    return tuple(notes)


def angles_of(affine: np.ndarray) -> tuple[float, float]:
    """How far the voxel axes are from the world's axes, and from right angles to each other, in degrees."""
    unit = np.asarray(affine, dtype=np.float64)[:3, :3] / np.asarray(spacing_of(affine))
    oblique = np.degrees(np.arccos(np.clip(np.abs(unit).max(axis=0), 0, 1))).max()
    cosines = np.abs(unit.T @ unit - np.eye(3)).max()
    return float(oblique), float(np.degrees(np.arcsin(np.clip(cosines, 0, 1))))


def _header(scan: Scan) -> nib.Nifti1Image | None:
    """The header of a file that has one, whatever else may be wrong with it."""
    try:
        image = nib.load(scan.path)
    except Exception:  # damaged headers make nibabel raise nearly any type; `load_volume` says what is wrong
        return None
    return image if isinstance(image, nib.Nifti1Image) else None


def _geometry(image: nib.Nifti1Image) -> dict[str, Any]:
    affine = np.asarray(image.affine, dtype=np.float64)
    known: dict[str, Any] = {
        "shape": tuple(int(n) for n in image.shape),
        "dtype": str(image.get_data_dtype()),
    }
    spacing = spacing_of(affine)
    if not np.isfinite(affine).all() or min(spacing) <= 0:
        return known
    oblique, shear = angles_of(affine)
    return known | {
        "orientation": "".join(code or "?" for code in nib.aff2axcodes(affine)),
        "spacing_mm": tuple(round(mm, 4) for mm in spacing),
        "oblique_deg": round(oblique, 2),
        "shear_deg": round(shear, 2),
    }


def _non_finite_share(image: nib.Nifti1Image) -> float | None:
    """Of a refused scan's voxels; None where it cannot be said, or has too many to count in passing."""
    if image.get_data_dtype().kind not in "iuf" or np.prod(image.shape, dtype=object) > _MAX_COUNTED_VOXELS:
        return None
    try:
        return float(1 - np.isfinite(np.asanyarray(image.dataobj)).mean())
    except Exception:  # as above: a truncated or damaged file has told so already
        return None


def _changes(record: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[int, ...], tuple[int, ...]]:
    """The steps that do something, in words, and the voxels cropped and padded per axis (RAS+)."""
    source, after = record["source"], record["spacing_mm"]
    before = spacing_of(np.asarray(record["ras_affine"]))
    kept = [stop - start for start, stop in record["inside"]]
    cropped = tuple(n - k for n, k in zip(record["resampled_shape"], kept, strict=True))
    padded = tuple(n - k for n, k in zip(record["settings"]["size"], kept, strict=True))
    changes = []
    if source["orientation"] != "RAS":
        changes.append(f"{source['orientation']} to RAS")
    if not np.allclose(before, after, rtol=1e-4):
        changes.append(f"resample {_by(before)} to {_by(after)} mm")
    if any(cropped):
        changes.append(f"crop {'x'.join(map(str, cropped))}")
    if any(padded):
        changes.append(f"pad {'x'.join(map(str, padded))}")
    return tuple(changes), cropped, padded


def _header_notes(image: nib.Nifti1Image) -> list[str]:
    notes = []
    header = image.header
    unit = header.get_xyzt_units()[0]
    if unit not in ("mm", "unknown"):
        notes.append(f"the header's unit of length is {unit}; it is read as mm")
    sform, qform = header.get_sform(coded=True)[0], _qform(header)
    if sform is not None and qform is not None:
        handed = np.sign(np.linalg.det(sform[:3, :3])) == np.sign(np.linalg.det(qform[:3, :3]))
        turned = _angle_between(sform, qform)
        if not handed:
            notes.append("sform and qform differ in handedness: left and right are uncertain; the sform is used")
        elif turned > _FORMS_DEG:
            notes.append(f"sform and qform differ by {turned:.0f} degrees; the sform is used")
    return notes


def _qform(header: nib.Nifti1Header) -> np.ndarray | None:
    try:
        return header.get_qform(coded=True)[0]
    except Exception:  # quaternions that are none; the sform is there and used
        return None


def _angle_between(one: np.ndarray, other: np.ndarray) -> float:
    """Largest angle between the same voxel axis of two affines, in degrees."""
    a, b = (m[:3, :3] / np.asarray(spacing_of(m)) for m in (one, other))
    return float(np.degrees(np.arccos(np.clip((a * b).sum(axis=0), -1, 1))).max())


def _by(values: Sequence[float]) -> str:
    """`1` for three equal numbers, else `1x1x1.2`."""
    shown = [f"{value:.3g}" for value in values]
    return shown[0] if len(set(shown)) == 1 else "x".join(shown)
