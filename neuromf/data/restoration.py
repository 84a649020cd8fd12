"""Network volume -> scan: what `preprocess` and N4 did, undone in reverse order by the record that lies in each latent.

1. *intensity*: x = y (upper - lower) + lower; a bias field that was divided out is multiplied back.
2. *crop/pad*: the box goes back to its place in the field of view; what the crop left out is the scan's darkest value.
3. *resample*: to the scan's own voxels by cubic splines, which bring back more of what a coarser grid holds than
   straight lines do, limited to the volume's range; beyond the grid's outermost voxels their values go on.
4. *RAS*: axes in the order and direction of the file, with the file's affine.

What smoothing, clipping and skull stripping took away stays lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from scipy import ndimage

from neuromf.data.bias_field import field_on
from neuromf.data.preprocessing import crop_or_pad
from neuromf.data.volumes import spacing_of

# Spacings that were left alone differ by no more than this.
_ROUNDING = 1e-9


class Restored(NamedTuple):
    """A volume as its scan's file stored it: (I, J, K) in the file's own order, and the file's affine (4, 4)."""

    array: np.ndarray
    affine: np.ndarray


def restore(array: np.ndarray, record: Mapping[str, Any]) -> Restored:
    """All steps back, on the scan's own voxels and intensities.

    Args:
        array: (I, J, K) on the scale and grid of `Prepared.array`.
        record: `Prepared.record`, of this scan.
    """
    return restore_grid(restore_intensity(array, record), record, outside=record["intensity"]["lower"])


def restore_intensity(array: np.ndarray, record: Mapping[str, Any]) -> np.ndarray:
    """Undo the intensity step, x = y (upper - lower) + lower, to float32 rounding (clipped values stay lost).

    Where the record has a `bias_field` (see `bias_field.correct_bias`), that comes back as well.

    Args:
        array: on the scale of `Prepared.array`; any shape, with a bias field (..., I, J, K) of the record's grid.
        record: `Prepared.record`.
    """
    lower, upper = record["intensity"]["lower"], record["intensity"]["upper"]
    restored = np.asarray(array, dtype=np.float64) * (upper - lower) + lower
    if bias := record.get("bias_field"):
        field = field_on(bias, restored.shape[-3:], np.asarray(record["affine"]))
        restored = bias["lower"] + (restored - bias["lower"]) * field
    return restored.astype(np.float32)


def restore_grid(
    array: np.ndarray, record: Mapping[str, Any], *, outside: float = 0.0, nearest: bool = False
) -> Restored:
    """Undo crop, padding, resampling and the turn to RAS; intensities stay as they are.

    Args:
        array: (I, J, K) on the record's grid.
        record: `Prepared.record`.
        outside: what stands where the crop left the scan out.
        nearest: take the nearest voxel, as labels need it, instead of a spline.
    """
    i, j, k = (-int(n) for n in record["crop_start"])
    field, _ = crop_or_pad(array, (i, j, k), tuple(record["resampled_shape"]), outside)
    ras = np.asarray(record["ras_affine"])
    factor = np.asarray(spacing_of(np.asarray(record["affine"]))) / np.asarray(spacing_of(ras))
    factor[np.abs(factor - 1) < _ROUNDING] = 1.0
    if (factor != 1).any():
        shape = np.asarray(record["ras_shape"])
        # The inverse of `resample`: both fields of view have one centre.
        offset = (np.asarray(field.shape) - 1) / 2 - (shape - 1) / (2 * factor)
        low, high = field.min(), field.max()
        order = 0 if nearest else 3
        field = ndimage.affine_transform(
            field, 1 / factor, offset, output_shape=tuple(shape), order=order, mode="nearest"
        ).clip(low, high)
    source = np.asarray(record["source"]["affine"])
    turn = ornt_transform(axcodes2ornt("RAS"), io_orientation(source))
    return Restored(np.ascontiguousarray(apply_orientation(field, turn)), source)
