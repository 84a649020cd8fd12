"""A MeshNet on a scan: conform, segment, keep the largest part, and bring the labels back to the scan's voxels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage

from neuromf.data.conform import conform, to_grid_of
from neuromf.data.preprocessing import head_mask
from neuromf.data.volumes import Volume
from neuromf.models.meshnet import LoadedMeshNet

# Beyond the head; networks that look at no statistics of the volume need no more.
_MARGIN = 16
_TOUCHING = np.ones((3, 3, 3), dtype=bool)
_ML_PER_VOXEL = 1e-3


class Segmentation(NamedTuple):
    """What a network found in a scan.

    Attributes:
        labels: (I, J, K) uint8 on the scan's own voxels.
        volumes_ml: of each structure but the background, measured at 1 mm where the network works.
    """

    labels: np.ndarray
    volumes_ml: dict[str, float]


def segment(volume: Volume, loaded: LoadedMeshNet) -> Segmentation:
    """The labels of a scan in brainchop's way: of what is found, the largest connected part is kept.

    A network that standardises its layers sees the whole grid; another one the head and 16 mm around it, which
    takes half the time (docs/preprocessing.md says how many voxels differ).
    """
    network = loaded.network
    conformed = conform(volume)
    box = _whole if network.layout.standardised else _head_box(conformed.array)
    labels = np.zeros(conformed.array.shape, dtype=np.uint8)
    labels[box] = network.segment(torch.from_numpy(np.ascontiguousarray(conformed.array[box]))).numpy()
    labels = largest_part(labels)
    counts = np.bincount(labels.ravel(), minlength=len(network.layout.labels))
    names = network.layout.labels
    volumes_ml = {name: float(n) * _ML_PER_VOXEL for name, n in zip(names[1:], counts[1:], strict=True)}
    return Segmentation(to_grid_of(volume, labels, conformed.affine), volumes_ml)


def largest_part(labels: np.ndarray) -> np.ndarray:
    """`labels` without the voxels that do not hang together, by faces, edges or corners, with most others."""
    parts, count = ndimage.label(labels > 0, structure=_TOUCHING)
    if count <= 1:
        return labels
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return np.where(parts == sizes.argmax(), labels, 0).astype(labels.dtype)


_whole = (slice(None),) * 3


def _head_box(array: np.ndarray) -> tuple[slice, ...]:
    found = ndimage.find_objects(head_mask(array).astype(np.uint8))
    return tuple(slice(max(axis.start - _MARGIN, 0), axis.stop + _MARGIN) for axis in found[0]) if found else _whole
