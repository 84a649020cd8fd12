"""The grid of FreeSurfer and brainchop: 256 x 256 x 256 voxels of 1 mm, axes to the left, down and to the front.

`conform` is what `mri_convert --conform` does: trilinear, world-aligned, the middle of the field of view in the middle,
256 grey values. `to_grid_of` brings labels from there back to a scan's own voxels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import ndimage

from neuromf.data.preprocessing import antialiased, head_mask
from neuromf.data.volumes import Volume, spacing_of

EDGE = 256
"""Voxels per axis, of 1 mm."""
_UPPER_PERCENTILE = 99.9
_GREYS = 255
# mm between the top of a head and the end of the grid, where the field of view is taller than it.
_ABOVE = 10


class Conformed(NamedTuple):
    """A scan on the conformed grid.

    Attributes:
        array: (256, 256, 256) float32 in [0, 1], in steps of 1 / 255; voxel indices run left, down and to the front.
        affine: (4, 4).
    """

    array: np.ndarray
    affine: np.ndarray


def conform(volume: Volume) -> Conformed:
    """A scan on the conformed grid; a field of view larger than 256 mm is centred on the head, its top kept.

    The darkest voxel becomes 0, the 99.9th percentile of the others 1.
    """
    lower = float(volume.array.min())
    upper = float(np.percentile(volume.array[volume.array > lower], _UPPER_PERCENTILE))
    ras = np.eye(4)
    ras[:3, 3] = _centre(volume) - (EDGE - 1) / 2
    to_scan = np.linalg.inv(volume.affine) @ ras
    smooth = antialiased(volume.array, 1 / np.asarray(spacing_of(volume.affine)))
    array = _sampled(smooth, to_scan, (EDGE, EDGE, EDGE), order=1, outside=lower)
    array = np.rint(((array - lower) * (_GREYS / (upper - lower))).clip(0, _GREYS)) / _GREYS
    return Conformed(np.ascontiguousarray(_turned(array), dtype=np.float32), ras @ _LIA_TO_RAS)


def to_grid_of(volume: Volume, labels: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Labels (256, 256, 256) of `Conformed.affine` on the voxels of a scan: the nearest; outside 0."""
    from_scan = np.linalg.inv(affine @ np.linalg.inv(_LIA_TO_RAS)) @ volume.affine
    return _sampled(_turned_back(labels), from_scan, volume.array.shape, order=0, outside=0)


def _sampled(
    array: np.ndarray, matrix: np.ndarray, shape: tuple[int, ...], *, order: int, outside: float
) -> np.ndarray:
    """`array` at the places `matrix` (4, 4) sends the voxels of `shape` to."""
    linear, shift = matrix[:3, :3], matrix[:3, 3]
    diagonal = np.diag(linear)
    # Separable, and many times faster, where the axes agree.
    straight = np.allclose(linear, np.diag(diagonal), atol=1e-9)
    return ndimage.affine_transform(
        array, diagonal if straight else linear, shift, output_shape=shape, order=order, mode="constant", cval=outside
    )


# Voxel indices (left, down, front) of the conformed grid to those of the same grid in RAS order.
_LIA_TO_RAS = np.array([[-1, 0, 0, EDGE - 1], [0, 0, 1, 0], [0, -1, 0, EDGE - 1], [0, 0, 0, 1]], dtype=np.float64)


def _turned(ras: np.ndarray) -> np.ndarray:
    """RAS order -> left, down, front."""
    return ras[::-1, :, ::-1].transpose(0, 2, 1)


def _turned_back(lia: np.ndarray) -> np.ndarray:
    """Left, down, front -> RAS order."""
    return np.ascontiguousarray(lia.transpose(0, 2, 1)[::-1, :, ::-1])


def _centre(volume: Volume) -> np.ndarray:
    """World position of the grid's middle, (3,) mm."""
    shape = np.asarray(volume.array.shape)
    middle = (shape - 1) / 2
    reach_mm = shape * np.asarray(spacing_of(volume.affine))
    if (reach_mm <= EDGE).all():
        return _world(volume, middle)
    where = np.argwhere(head_mask(volume.array))
    first, last = where.min(axis=0), where.max(axis=0)
    middle = np.where(reach_mm > EDGE, (first + last) / 2, middle)
    tall = (last[2] - first[2]) * spacing_of(volume.affine)[2]
    if reach_mm[2] > EDGE and tall > EDGE - 2 * _ABOVE:
        middle[2] = last[2] - (EDGE / 2 - _ABOVE) / spacing_of(volume.affine)[2]
    return _world(volume, middle)


def _world(volume: Volume, index: np.ndarray) -> np.ndarray:
    return volume.affine[:3, :3] @ index + volume.affine[:3, 3]
