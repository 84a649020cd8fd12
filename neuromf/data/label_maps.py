"""Label maps of heads: what they hold, and reading them from NIfTI files."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from neuromf.data.label_table import IS_BRAIN, LABELS, NUMBERS
from neuromf.data.volumes import load_volume
from neuromf.errors import ScanError


@dataclass(frozen=True)
class LabelMap:
    """Tissue labels (I, J, K) in FreeSurfer/SynthSeg numbers, RAS+, and the (4, 4) affine to mm.

    `lesion_mask` (I, J, K) marks a lesion that was drawn on purpose (phantoms), else None.
    """

    labels: np.ndarray
    affine: np.ndarray
    lesion_mask: np.ndarray | None = None

    @cached_property
    def rows(self) -> np.ndarray:
        """The labels as rows of the label table, (I, J, K) uint8."""
        return to_rows(self.labels, "the label map")

    @cached_property
    def brain_box_mm(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest corner (3,) of the box around the brain, in mm; around the grid if there is none."""
        brain = IS_BRAIN[self.rows]
        low, high = np.zeros(3), np.array(brain.shape) - 1.0
        for axis in range(3):
            others = tuple(other for other in range(3) if other != axis)
            inside = np.flatnonzero(brain.any(axis=others))
            if inside.size:
                low[axis], high[axis] = inside[0], inside[-1]
        corners = np.stack([low, high]) @ self.affine[:3, :3].T + self.affine[:3, 3]
        return corners.min(axis=0), corners.max(axis=0)

    @property
    def brain_centre_mm(self) -> np.ndarray:
        """Centre (3,) of the box around the brain, in mm."""
        low, high = self.brain_box_mm
        return (low + high) / 2


def to_rows(labels: np.ndarray, source: str) -> np.ndarray:
    """Turn label numbers into rows of the label table (uint8).

    Raises:
        ScanError: numbers that the table does not have.
    """
    if labels.size and int(labels.min()) < 0:
        raise ScanError(f"{source} has negative labels", "give a map in FreeSurfer/SynthSeg numbers")
    present = np.flatnonzero(np.bincount(labels.reshape(-1)))
    unknown = present[~np.isin(present, NUMBERS)]
    if unknown.size:
        listed = ", ".join(str(int(number)) for number in unknown[:12]) + (", ..." if unknown.size > 12 else "")
        raise ScanError(
            f"{source} has labels that are not known here: {listed}",
            "known are the FreeSurfer/SynthSeg numbers "
            + ", ".join(f"{label.number} {label.name}" for label in LABELS if label.number <= label.mirror)
            + " (and their right-hand twins): renumber the map",
        )
    row_of_number = np.zeros(int(NUMBERS.max()) + 1, dtype=np.uint8)
    row_of_number[NUMBERS] = np.arange(len(NUMBERS))
    return row_of_number[labels]


def load_label_map(path: str | Path) -> LabelMap:
    """Read a NIfTI label map in FreeSurfer/SynthSeg numbers; whole numbers stored as float are fine.

    Raises:
        ScanError: what `load_volume` refuses, values that are not whole numbers, or unknown labels.
    """
    volume = load_volume(path)
    whole = np.rint(volume.array)
    error_max = float(np.abs(volume.array - whole).max())
    if error_max > 1e-3:
        raise ScanError(
            f"{path} holds values that are not whole numbers (off by up to {error_max:.3g})",
            "a label map is wanted, not an image; resample label maps with nearest neighbour",
        )
    low, high = int(whole.min()), int(whole.max())
    if low < 0 or high > np.iinfo(np.int16).max:
        raise ScanError(
            f"{path} has labels from {low} to {high}; known are 0 to {NUMBERS.max()}",
            "give a map in FreeSurfer/SynthSeg numbers",
        )
    labels = whole.astype(np.int16)
    return with_rows(labels, volume.affine, to_rows(labels, str(path)))


def with_rows(
    labels: np.ndarray, affine: np.ndarray, rows: np.ndarray, lesion_mask: np.ndarray | None = None
) -> LabelMap:
    """Build a label map whose rows of the label table are known already."""
    label_map = LabelMap(labels, affine, lesion_mask)
    label_map.__dict__["rows"] = rows  # fills the cached property
    return label_map
