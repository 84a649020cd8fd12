"""Scan -> network volume: resample to a spacing, crop or pad to a size, scale the intensity (`restoration`: back).

The steps, in this order (each is written to the record of the result):

1. *resample*: trilinear, about the centre of the field of view; where the new spacing is coarser the scan is
   smoothed first (Gaussian, sigma = (factor - 1) / 2 voxels). The axes keep their directions.
2. *crop/pad* to `size`, centred on the head; nothing is ever stretched to fit.
3. *intensity*: y = (x - p0) / (p99.5 - p0), over the voxels that come from the scan; the padding is 0.
   Values above 1 are kept unless `clip_intensity`. With `intensity="foreground"` p99.5 is that of the head mask
   alone, so that it does not depend on how much air the box holds.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from scipy import ndimage

from neuromf.data.volumes import Volume, spacing_of
from neuromf.errors import ScanError, UserError, did_you_mean

# A factor this near to 1 moves the outermost voxel of a 512 grid by less than a twentieth of a voxel.
_SAME_SPACING = 1e-4
_MAX_VOXELS = 2**30


@dataclass(frozen=True)
class Preprocessing:
    """How scans become volumes of one grid.

    Attributes:
        size: voxels per axis (I, J, K) of the result.
        spacing_mm: of the result, one number or three (kept as three); None keeps each scan's own spacing.
        upper_percentile: the intensity that becomes 1 (p0 becomes 0).
        clip_intensity: limit the result to [0, 1]; then the intensity above is lost.
        centre: "head" centres on the head mask, "grid" on the middle of the field of view.
        intensity: where the upper percentile is taken: "percentile" of all voxels, "foreground" of the head (or the
            stripped brain); p0 is always the darkest voxel.
    """

    size: tuple[int, int, int]
    spacing_mm: float | tuple[float, float, float] | None
    upper_percentile: float = 99.5
    clip_intensity: bool = False
    centre: Literal["head", "grid"] = "head"
    intensity: Literal["percentile", "foreground"] = "percentile"

    def __post_init__(self) -> None:
        size = tuple(int(n) for n in self.size)
        if len(size) != 3 or size != tuple(self.size) or min(size) < 1:
            raise UserError(f"size {self.size} is not a grid", "three positive whole numbers: 128 128 128")
        object.__setattr__(self, "size", size)
        if self.spacing_mm is not None:
            given = self.spacing_mm if isinstance(self.spacing_mm, list | tuple) else (self.spacing_mm,) * 3
            object.__setattr__(self, "spacing_mm", tuple(float(s) for s in given))
        spacing = self.spacing
        if spacing is not None and not (len(spacing) == 3 and all(0 < s < math.inf for s in spacing)):
            raise UserError(
                f"spacing {self.spacing_mm} mm cannot be used", "one or three positive numbers of mm, or none"
            )
        if not 0 < self.upper_percentile <= 100:
            raise UserError(f"upper percentile {self.upper_percentile} is not above 0 and at most 100")
        if self.centre not in ("head", "grid"):
            raise UserError(f"no centre '{self.centre}'", "available: head, grid")
        if self.intensity not in ("percentile", "foreground"):
            raise UserError(
                f"no intensity '{self.intensity}'", did_you_mean(self.intensity, ("percentile", "foreground"))
            )

    @property
    def spacing(self) -> tuple[float, float, float] | None:
        """The target spacing per axis in mm, or None where each scan keeps its own."""
        return cast(tuple[float, float, float] | None, self.spacing_mm)

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the settings: equal settings, equal digest."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        values = asdict(self)
        if self.intensity == "percentile":
            del values["intensity"]  # younger than the folders of latents that must agree with it
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """The settings stored by `to_dict`.

        Raises:
            UserError: an unknown or missing key, or a value that is not allowed.
        """
        known = {field.name for field in fields(cls)}
        wrong = sorted(set(values) - known) + sorted({"size", "spacing_mm"} - set(values))
        if wrong:
            raise UserError(f"preprocessing settings: unknown or missing {', '.join(wrong)}")
        return cls(**values)


class Prepared(NamedTuple):
    """A scan on the training grid.

    Attributes:
        array: (1, I, J, K) float32, p0 -> 0 and the upper percentile -> 1.
        affine: (4, 4) float64 of this grid: a landmark keeps its world position.
        record: plain values, everything needed to invert: settings, source, resampling, crop, intensity.
    """

    array: np.ndarray
    affine: np.ndarray
    record: dict[str, Any]


def preprocess(volume: Volume, spec: Preprocessing) -> Prepared:
    """Bring one scan to the grid and intensity scale of `spec` (see the module's text for the steps).

    Raises:
        ScanError: the scan has no contrast within the box, or the spacing asks for an absurd number of voxels.
    """
    resampled, affine = resample(volume.array, volume.affine, spec.spacing)
    mask = head_mask(resampled)
    if not mask.any():
        raise ScanError(
            f"at this spacing only {' x '.join(map(str, resampled.shape))} equal voxels are left",
            "choose a finer spacing, or check the scan's own spacing",
        )
    start = _window_start(mask, spec)
    box, inside = crop_or_pad(resampled, start, spec.size)
    affine = _shifted(affine, start)
    kept, _ = crop_or_pad(mask, start, spec.size)
    scaled, intensity = _scale_intensity(box[inside], kept[inside], spec)
    result = np.zeros((1, *spec.size), dtype=np.float32)
    result[0][inside] = scaled

    record = {
        "settings": spec.to_dict(),
        "source": volume.source,
        "ras_shape": [int(n) for n in volume.array.shape],
        "ras_affine": volume.affine.tolist(),
        "resampled_shape": [int(n) for n in resampled.shape],
        "crop_start": [int(n) for n in start],
        "inside": [[axis.start, axis.stop] for axis in inside],
        "affine": affine.tolist(),
        "spacing_mm": list(spacing_of(affine)),
        "intensity": intensity,
        "foreground_lost": float(1 - kept.sum() / mask.sum()),
        "padded": float(1 - scaled.size / result.size),
    }
    return Prepared(result, affine, record)


def resample(
    array: np.ndarray, affine: np.ndarray, spacing_mm: tuple[float, float, float] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Trilinear resampling about the centre of the field of view, antialiased where it gets coarser.

    Args:
        array: (I, J, K) float32.
        affine: (4, 4).
        spacing_mm: wanted; None, or a spacing already met to 1e-4, leaves the axis alone.

    Returns:
        The array, round(n * old / new) voxels per axis, and its affine.
    """
    if spacing_mm is None:
        return array, affine
    factor = np.asarray(spacing_mm) / np.asarray(spacing_of(affine))
    factor[np.abs(factor - 1) < _SAME_SPACING] = 1.0
    if (factor == 1).all():
        return array, affine
    shape = np.asarray(array.shape)
    new_shape = np.maximum(1, np.rint(shape / factor)).astype(int)
    if math.prod(int(n) for n in new_shape) > _MAX_VOXELS:
        raise ScanError(
            f"at {spacing_mm} mm this scan would have {' x '.join(map(str, new_shape))} voxels",
            "choose a coarser spacing, or check the scan's own spacing",
        )
    offset = (shape - 1) / 2 - factor * (new_shape - 1) / 2
    smooth = antialiased(array, factor)
    result = ndimage.affine_transform(
        smooth, factor, offset, output_shape=tuple(new_shape), order=1, mode="nearest", output=np.float32
    )
    return result, affine @ np.vstack([np.column_stack([np.diag(factor), offset]), [0, 0, 0, 1]])


def antialiased(array: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Smooth the axes that get coarser, so that fine detail does not fold into coarse: sigma = (factor - 1) / 2 voxels.

    Args:
        array: (I, J, K).
        factor: new voxel edge / old voxel edge, per axis.
    """
    sigma = np.maximum(0.0, (np.asarray(factor) - 1) / 2)
    return ndimage.gaussian_filter(array, sigma, mode="nearest") if sigma.any() else array


def head_mask(array: np.ndarray) -> np.ndarray:
    """The head (or the stripped brain): the largest connected part above half of Otsu's threshold.

    Otsu (1979) is taken below the 99th percentile, so that fat and vessels do not pull it up; half of it keeps
    dark grey matter and muscle and stays above the noise of air. An opening cuts thin bridges.

    Args:
        array: (I, J, K).

    Returns:
        (I, J, K) bool; empty only where all voxels are equal.
    """
    lower, upper = float(array.min()), float(np.percentile(array, 99))
    if upper <= lower:
        return array > lower
    mask = array > lower + 0.5 * (_otsu(array, lower, upper) - lower)
    opened = ndimage.binary_opening(mask)
    mask = opened if opened.any() else mask
    labels, count = ndimage.label(mask)
    if count <= 1:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return labels == sizes.argmax()


def crop_or_pad(
    array: np.ndarray, start: tuple[int, int, int], size: tuple[int, ...], outside: float = 0.0
) -> tuple[np.ndarray, tuple[slice, slice, slice]]:
    """Cut the box of `size` voxels that begins at index `start` (may be negative); elsewhere it is `outside`.

    Returns:
        The box, and the slices of it that come from `array`.
    """
    first = [max(0, s) for s in start]
    last = [max(f, min(n, s + m)) for n, s, m, f in zip(array.shape, start, size, first, strict=True)]
    inside = tuple(slice(f - s, e - s) for f, e, s in zip(first, last, start, strict=True))
    box = np.full(size, outside, dtype=array.dtype)
    box[inside] = array[tuple(slice(f, e) for f, e in zip(first, last, strict=True))]
    return box, (inside[0], inside[1], inside[2])


def _otsu(array: np.ndarray, lower: float, upper: float) -> float:
    """The threshold with the largest variance between the two classes, on 256 bins."""
    counts, edges = np.histogram(array, bins=256, range=(lower, upper))
    middles = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = counts.sum() - below
    moment = np.cumsum(counts * middles)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (moment / below - (moment[-1] - moment) / above) ** 2
    # Where the histogram is empty between the classes every threshold is as good: take the middle one.
    between = np.nan_to_num(between)
    return float(middles[between >= (1 - 1e-6) * between.max()].mean())


def _window_start(mask: np.ndarray, spec: Preprocessing) -> tuple[int, int, int]:
    """First voxel of the box per axis; where the whole field of view fits, all of it is kept.

    Centred on the middle of the head's extent, so a head that fits is never cut. A head taller than the box
    keeps its top (axis K is up in RAS+): the brain is there, the neck goes.
    """
    start = []
    for axis, (length, size) in enumerate(zip(mask.shape, spec.size, strict=True)):
        first, end = 0, length
        if spec.centre == "head":
            extent = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
            first, end = int(extent[0]), int(extent[-1]) + 1
        begin = (first + end - size) // 2
        if axis == 2 and end - first > size and spec.centre == "head":
            begin = end - size
        if size >= length:
            begin = min(0, max(length - size, begin))
        start.append(begin)
    return start[0], start[1], start[2]


def _shifted(affine: np.ndarray, start: tuple[int, int, int]) -> np.ndarray:
    shifted = affine.copy()
    shifted[:3, 3] = affine[:3, :3] @ np.asarray(start, dtype=np.float64) + affine[:3, 3]
    return shifted


def _scale_intensity(
    values: np.ndarray, foreground: np.ndarray, spec: Preprocessing
) -> tuple[np.ndarray, dict[str, Any]]:
    judged = values[foreground] if spec.intensity == "foreground" and foreground.any() else values
    lower, upper = float(values.min()), float(np.percentile(judged, spec.upper_percentile))
    if not upper > lower:
        raise ScanError(
            f"percentiles 0 and {spec.upper_percentile:g} within the box are both {lower:g}: nothing to scale",
            "check that the scan shows a head within its field of view, or choose a larger size",
        )
    scaled = ((values.astype(np.float64) - lower) / (upper - lower)).astype(np.float32)
    if spec.clip_intensity:
        scaled = scaled.clip(0, 1)
    return scaled, {
        "lower": lower,
        "upper": upper,
        "upper_percentile": float(spec.upper_percentile),
        "clipped": spec.clip_intensity,
        "foreground_share": float(judged.size / values.size),
    }
