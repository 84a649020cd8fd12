"""The slow change of brightness across a scan that coils make: estimated by N4, divided out, and kept for the way back.

N4 (Tustison et al., IEEE TMI 2010, doi 10.1109/TMI.2010.2046908) as SimpleITK has it, on the scan shrunk to about 4 mm:

    x = lower + (x' - lower) field,    field > 0 with geometric mean 1 over the mask,

with x the scan, x' the corrected one and lower the scan's minimum. The record holds log field on a few knots, from
which `field_on` gives it on any grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import numpy as np
from scipy import ndimage

from neuromf.data.volumes import Volume, spacing_of
from neuromf.errors import ScanError, UserError

# N4's own field has 11 control points per axis at the fourth level; cubic splines through 12 knots follow it closely.
_KNOTS = 12
_DIGITS = 5


@dataclass(frozen=True)
class BiasCorrection:
    """How N4 works.

    Attributes:
        iterations: at most, at each level; every level doubles the field's resolution.
        convergence: relative change at which a level ends.
        working_mm: spacing the scan is shrunk to, about.
    """

    iterations: tuple[int, ...] = (50, 50, 50, 50)
    convergence: float = 1e-3
    working_mm: float = 4.0

    @property
    def identity(self) -> dict[str, Any]:
        """Plain values, with the version of SimpleITK.

        Raises:
            UserError: SimpleITK is not installed.
        """
        version = str(_simpleitk().Version_VersionString())
        return {"method": "n4", "simpleitk": version, **asdict(self), "iterations": list(self.iterations)}


def correct_bias(
    volume: Volume, mask: np.ndarray, settings: BiasCorrection | None = None
) -> tuple[Volume, dict[str, Any]]:
    """Estimate the field where `mask` is set, and divide the whole scan by it.

    Args:
        volume: a scan; its minimum stays what it is.
        mask: (I, J, K) bool, what the field is estimated from: the head, or the brain.
        settings: of N4.

    Returns:
        The corrected scan, and a record: settings, field_p1 and field_p99 over the mask, and `log_field` (n, n, n),
        equally spaced over the scan's voxels.

    Raises:
        UserError: SimpleITK is not installed.
        ScanError: N4 fails on this scan.
    """
    settings = settings or BiasCorrection()
    lower = float(volume.array.min())
    log_field, shrink = _estimate(volume, volume.array - lower, mask, settings)
    log_field -= log_field[mask].mean()
    corrected = (lower + (volume.array - lower) * np.exp(-log_field)).astype(np.float32)
    low, high = np.exp(np.percentile(log_field[mask], (1, 99)))
    record = settings.identity | {
        "shrink": shrink,
        "lower": lower,
        "field_p1": float(low),
        "field_p99": float(high),
        "log_field": np.round(_at_knots(log_field), _DIGITS).tolist(),
        "shape": list(volume.array.shape),
        "affine": volume.affine.tolist(),
    }
    return volume._replace(array=corrected), record


def field_on(record: Mapping[str, Any], shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """The field of a `correct_bias` record on another grid, (I, J, K) float32; beyond the scan its edge goes on."""
    log_field = np.asarray(record["log_field"], dtype=np.float32)
    to_scan = np.linalg.inv(np.asarray(record["affine"])) @ affine
    to_knots = np.diag([*((np.asarray(log_field.shape) - 1) / (np.asarray(record["shape"]) - 1)), 1.0]) @ to_scan
    return np.exp(
        ndimage.affine_transform(
            log_field, to_knots[:3, :3], to_knots[:3, 3], output_shape=tuple(shape), order=3, mode="nearest"
        )
    )


def _estimate(
    volume: Volume, values: np.ndarray, mask: np.ndarray, settings: BiasCorrection
) -> tuple[np.ndarray, list[int]]:
    """log field on the scan's voxels, and the shrink factors."""
    sitk = _simpleitk()
    spacing = spacing_of(volume.affine)
    usable = mask & (values > 0)
    # Four voxels per axis are the least a cubic spline is fitted to.
    shrink = [
        max(1, min(round(settings.working_mm / edge), n // 4))
        for edge, n in zip(spacing, volume.array.shape, strict=True)
    ]
    image, where = (sitk.GetImageFromArray(np.ascontiguousarray(a.T)) for a in (values, usable.astype(np.uint8)))
    for each in (image, where):
        each.SetSpacing(spacing)
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.SetMaximumNumberOfIterations(settings.iterations)
    n4.SetConvergenceThreshold(settings.convergence)
    try:
        n4.Execute(sitk.Shrink(image, shrink), sitk.Shrink(where, shrink))
        field = sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(image)).T
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ScanError(f"N4 fails on this scan: {reason}", "look at the scan, or encode without --n4") from error
    if not np.isfinite(field).all():
        raise ScanError("N4 gives a field that is not finite for this scan", "look at it, or encode without --n4")
    return np.ascontiguousarray(field, dtype=np.float32), shrink


def _at_knots(field: np.ndarray) -> np.ndarray:
    """`field` at equally spaced places, first and last voxel included, (n, n, n)."""
    axes = [np.linspace(0, n - 1, min(n, _KNOTS)) for n in field.shape]
    return ndimage.map_coordinates(field, np.meshgrid(*axes, indexing="ij"), order=1, mode="nearest")


def _simpleitk() -> ModuleType:
    try:
        import SimpleITK
    except ImportError as error:
        raise UserError(
            "N4 needs SimpleITK, which is not installed", "pip install 'neuromf[prep]', or encode without --n4"
        ) from error
    return SimpleITK
