"""Augmented copies of a scan: a small turn and stretch, a tone curve, a mirror; drawn per subject and copy.

A copy is made from the scan as it came, not from the preprocessed volume: turning, stretching, resampling and
cropping are one map from the copy's voxels to the scan's, so that nothing is interpolated twice. The kernel is
trilinear where preprocessing resamples the scan (with that same kernel), and a cubic spline where the scan itself is
not interpolated, so that copies are about as sharp as their originals. The steps:

1. *geometry*: a point at p mm from the middle of the box lands at R S p, with R the rotation about the axes I, then
   J, then K, and S the stretch along them. The padding stays where it is; where the copy looks beyond the scan's
   edge, the edge voxel is repeated (as preprocessing does).
2. *intensity*, on the scale of the volume: y' = gain y^gamma + offset min(y / 0.1, 1). The offset fades out
   towards 0, so that air and stripped background keep their value.
3. *flip* of the axis I, exact: no interpolation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from neuromf.data.preprocessing import Prepared, antialiased
from neuromf.data.volumes import Volume, spacing_of
from neuromf.errors import UserError, did_you_mean

_TOE = 0.1
_RIM = 12
_SAME = 1e-6
_LIMITS = {"flip": 1.0, "intensity": 0.5, "rotation_deg": 45.0, "scale": 0.5}
_Three = tuple[float, float, float]


class Change(NamedTuple):
    """What makes one copy differ from its scan (see the module's text).

    Attributes:
        flip: mirrored left to right, after everything else.
        rotation_deg: about the axes I, J, K.
        scale: along I, J, K; above 1 enlarges.
        gain, offset, gamma: of the tone curve.
    """

    flip: bool = False
    rotation_deg: _Three = (0.0, 0.0, 0.0)
    scale: _Three = (1.0, 1.0, 1.0)
    gain: float = 1.0
    offset: float = 0.0
    gamma: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in self._asdict().items()}


@dataclass(frozen=True)
class Augmentation:
    """How far copies may differ from their scan; every draw is uniform.

    Attributes:
        flip: probability of a left-right flip.
        intensity: gain and gamma within 1 +- this, offset within +- this.
        rotation_deg: about each axis, within +- this.
        scale: along each axis, within 1 +- this.
        seed: another seed, other copies.
    """

    flip: float = 0.5
    intensity: float = 0.05
    rotation_deg: float = 2.0
    scale: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            if not 0 <= value <= limit:
                raise UserError(
                    f"augmentation {name}={value:g} cannot be used",
                    f"a number from 0 (leave it out) to {limit:g}, as in {name}={getattr(type(self), name):g}",
                )

    def changed(self, words: Mapping[str, str]) -> Augmentation:
        """These settings with some replaced, as a command line gives them: {"flip": "0"}.

        Raises:
            UserError: an unknown name, or a value that is no number or out of range.
        """
        values = {}
        for name, text in words.items():
            if name not in _LIMITS:
                raise UserError(f"no augmentation '{name}'", did_you_mean(name, _LIMITS))
            try:
                values[name] = float(text)
            except ValueError as error:
                raise UserError(f"augmentation {name}={text} is no number", f"as in {name}=0") from error
        return replace(self, **values)  # type: ignore[arg-type]

    def draw(self, subject: str, copy: int) -> Change:
        """The change that makes copy number `copy` of a subject; it depends on (seed, subject, copy) alone."""
        key = hashlib.sha256(f"{self.seed}\0{subject}\0{copy}".encode()).digest()
        # All are drawn, whatever the strengths: setting one to 0 leaves the others as they were.
        share, *signed = np.random.default_rng(list(key)).uniform([0.0] + [-1.0] * 9, 1.0).tolist()
        turn, stretch, tone = signed[:3], signed[3:6], signed[6:]
        return Change(
            flip=share < self.flip,
            rotation_deg=_three(self.rotation_deg * x for x in turn),
            scale=_three(1 + self.scale * x for x in stretch),
            gain=1 + self.intensity * tone[0],
            offset=self.intensity * tone[1],
            gamma=1 + self.intensity * tone[2],
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class Augmenter:
    """Makes the copies of one scan.

    Args:
        volume: the scan as it went into `preprocess`.
        prepared: what came out of it.
    """

    def __init__(self, volume: Volume, prepared: Prepared) -> None:
        self._volume, self._prepared = volume, prepared
        # From voxels of the box to voxels of the scan; both grids have the same axes.
        self._to_scan = np.linalg.inv(volume.affine) @ prepared.affine

    def copy(self, change: Change) -> np.ndarray:
        """The volume (1, I, J, K) float32 that `change` makes of the scan."""
        settings, inside = self._prepared.record["settings"], self._inside
        values = self._prepared.array[0][inside]
        if change.rotation_deg != Change().rotation_deg or change.scale != Change().scale:
            values = self._moved(change)
        values = tone_curve(values, change)
        if settings["clip_intensity"]:
            values = values.clip(0, 1)
        result = np.zeros_like(self._prepared.array)
        result[0][inside] = values
        return np.ascontiguousarray(result[:, ::-1]) if change.flip else result

    @property
    def _inside(self) -> tuple[slice, ...]:
        """The part of the box that comes from the scan; the rest is padding."""
        return tuple(slice(start, stop) for start, stop in self._prepared.record["inside"])

    @cached_property
    def _order(self) -> int:
        """Of the interpolation: 1 where preprocessing resamples every axis, 3 else."""
        return 1 if (np.abs(np.diag(self._to_scan)[:3] - 1) > _SAME).all() else 3

    @cached_property
    def _coefficients(self) -> np.ndarray:
        """Of the scan's spline, with a rim; smoothed first as for preprocessing's own resampling."""
        smooth = antialiased(self._volume.array, np.diag(self._to_scan)[:3])
        # What scipy does for mode="nearest" at every call: with a rim of repeated voxels the spline meets the edge.
        rimmed = np.pad(smooth, _RIM, mode="edge")
        return ndimage.spline_filter(rimmed, order=3, output=np.float32, mode="mirror") if self._order == 3 else rimmed

    def _moved(self, change: Change) -> np.ndarray:
        """The scan, turned and stretched about the middle of the box, on the volume's scale, inside alone."""
        size = np.asarray(self._prepared.array.shape[1:])
        middle, start = (size - 1) / 2, np.asarray([part.start for part in self._inside])
        back = pull_back(change, spacing_of(self._prepared.affine))
        linear, shift = self._to_scan[:3, :3], self._to_scan[:3, 3]
        intensity = self._prepared.record["intensity"]
        sampled = ndimage.affine_transform(
            self._coefficients,
            linear @ back,
            linear @ (middle + back @ (start - middle)) + shift + _RIM,
            output_shape=tuple(part.stop - part.start for part in self._inside),
            output=np.float32,
            order=self._order,
            mode="nearest",
            prefilter=False,
        )
        # A cubic spline overshoots at edges: nothing may be darker than p0 or brighter than the scan.
        sampled = sampled.clip(intensity["lower"], self._volume.array.max())
        return (sampled - np.float32(intensity["lower"])) / np.float32(intensity["upper"] - intensity["lower"])


def tone_curve(values: np.ndarray, change: Change) -> np.ndarray:
    """y' = gain y^gamma + offset min(y / 0.1, 1) for y >= 0; 0 stays 0, and the order of grey values is kept."""
    if (change.gain, change.offset, change.gamma) == (1.0, 0.0, 1.0):
        return values
    return (change.gain * values**change.gamma + change.offset * np.minimum(values / _TOE, 1)).astype(np.float32)


def pull_back(change: Change, spacing_mm: _Three) -> np.ndarray:
    """(3, 3): from a copy's voxel offsets to the scan's, D^-1 (R S)^-1 D with D the spacing."""
    rotation = Rotation.from_euler("xyz", change.rotation_deg, degrees=True).as_matrix()
    forward = rotation @ np.diag(change.scale)
    spacing = np.diag(spacing_mm)
    return np.linalg.inv(spacing) @ np.linalg.inv(forward) @ spacing


def _three(values: Any) -> _Three:
    i, j, k = values
    return i, j, k
