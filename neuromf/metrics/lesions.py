"""Masks compared: overlap, and how large and where the marked parts are. Arrays in, numbers out; mm and ml."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage


class Lesions(NamedTuple):
    """What masks mark, each (N,) or (N, 3).

    Attributes:
        volume_ml: of the whole mask; 0 where nothing is marked.
        parts: connected ones.
        centre_mm: centre of gravity in world mm; NaN where nothing is marked.
    """

    volume_ml: NDArray[np.float64]
    parts: NDArray[np.int64]
    centre_mm: NDArray[np.float64]


def dice(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """2 |A and B| / (|A| + |B|); 1 where both are empty."""
    both = int(a.sum()) + int(b.sum())
    return 2 * int((a & b).sum()) / both if both else 1.0


def describe_masks(masks: NDArray[np.bool_], affine: NDArray[np.float64]) -> Lesions:
    """Measure masks (N, I, J, K) of one grid with this affine (4, 4)."""
    voxel_ml = abs(float(np.linalg.det(affine[:3, :3]))) / 1000
    volume = masks.reshape(len(masks), -1).sum(1) * voxel_ml
    counts = np.array([ndimage.label(mask)[1] for mask in masks], dtype=np.int64)
    centres = np.full((len(masks), 3), np.nan)
    for n, mask in enumerate(masks):
        if mask.any():
            centres[n] = affine[:3, :3] @ np.argwhere(mask).mean(0) + affine[:3, 3]
    return Lesions(volume, counts, centres)


def nearest_dice(masks: NDArray[np.bool_], references: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The highest Dice of each mask with any reference, (N,); both (N or M, I, J, K)."""
    flat, known = (m.reshape(len(m), -1).astype(np.float32) for m in (masks, references))
    overlap = flat @ known.T
    sizes = flat.sum(1)[:, None] + known.sum(1)[None]
    return np.where(sizes > 0, 2 * overlap / np.maximum(sizes, 1), 1.0).max(axis=1).astype(np.float64)


def agreement(masks: NDArray[np.bool_], detected: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Dice of each mask (N, I, J, K) with what a detector finds in its image, (N,)."""
    return np.array([dice(a, b) for a, b in zip(masks, detected, strict=True)])
