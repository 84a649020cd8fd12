"""What is done to a scan before it is brought to the common grid: all but the brain removed, brightness evened out."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np

from neuromf.data.bias_field import BiasCorrection, correct_bias
from neuromf.data.preprocessing import head_mask
from neuromf.data.volumes import Volume, save_volume
from neuromf.errors import ScanError
from neuromf.pipeline.skull_strip import SkullStripper, brain_ml, read_mask, stripped

MASKS_FOLDER = "masks"


class Cleaned(NamedTuple):
    """A scan, cleaned, and what was done: `skull_strip` (identity, brain_ml), `bias_field` (see `data.bias_field`)."""

    volume: Volume
    record: dict[str, Any]


@dataclass(frozen=True)
class Cleaning:
    """Which of the two steps are taken; by default none.

    Attributes:
        stripper: finds the brain.
        bias: N4, within the brain where one was found, else within the head.
    """

    stripper: SkullStripper | None = None
    bias: BiasCorrection | None = None

    @property
    def identity(self) -> dict[str, Any] | None:
        """What must agree for scans to be cleaned alike; None where nothing is done."""
        steps = {"skull_strip": self.stripper, "bias_field": self.bias}
        return {name: step.identity for name, step in steps.items() if step is not None} or None

    def __call__(self, volume: Volume, mask_file: Path, sha256: str) -> Cleaned:
        """Clean a scan.

        Args:
            volume: the scan.
            mask_file: where its brain mask is kept: one that is there, of this scan and this stripper, is used again.
            sha256: of the scan's file.

        Raises:
            ScanError: no brain is found, or N4 fails.
        """
        record: dict[str, Any] = {}
        mask = None
        if self.stripper is not None:
            mask = self._mask(self.stripper, volume, mask_file, sha256)
            volume = stripped(volume, mask)
            record["skull_strip"] = self.stripper.identity | {"brain_ml": round(brain_ml(mask, volume.affine), 1)}
        if self.bias is not None:
            where = head_mask(volume.array) if mask is None else mask
            volume, record["bias_field"] = correct_bias(volume, where, self.bias)
        return Cleaned(volume, record)

    @staticmethod
    def _mask(stripper: SkullStripper, volume: Volume, file: Path, sha256: str) -> np.ndarray:
        key = hashlib.sha256(json.dumps([sha256, stripper.identity], sort_keys=True).encode()).hexdigest()
        if _key_of(file) == key and (known := read_mask(file, volume)) is not None:
            return known
        mask = stripper.mask(volume)
        if not mask.any():
            raise ScanError("no brain was found in this scan", "look at it, or encode with --skull-strip none")
        save_volume(file, mask, volume.affine, dtype=np.uint8, header_description=key)
        return mask


def _key_of(file: Path) -> str:
    """What `save_volume` was told of a mask; empty where there is none."""
    if not file.is_file():
        return ""
    try:
        return bytes(nib.Nifti1Image.from_filename(file).header["descrip"].item()).decode("ascii", "replace")
    except Exception:  # damaged files make nibabel raise nearly any type; the mask is made again
        return ""
