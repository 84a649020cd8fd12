"""The folder that `neuromf decode` writes: volumes, a JSON file beside each, decode_report.json and a montage.

A volume is done when its NIfTI file is there: that is written last. What the files say depends on their content alone,
so that any number of processes and restarts leave the same bytes.
"""

from __future__ import annotations

import gzip
import io
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from neuromf.data.volumes import nifti_stem, save_volume, spacing_of
from neuromf.errors import UserError
from neuromf.files import read_json, remove_leftovers, write_json
from neuromf.pipeline.volume_check import check_volume
from neuromf.reporting.figures import montage

Dtype = Literal["int16", "uint8", "float32"]
INTENSITY_SCALE = 1000
"""What a reader of a volume gets for intensity 1 (the 99.5th percentile), as NVIDIA's MAISI writes MR."""
REPORT = "decode_report.json"
MONTAGE, MONTAGE_VOLUMES = "montage.png", 16
_HEADER_BYTES = 352


@dataclass(frozen=True)
class VolumeFolder:
    """Where volumes go, and how they are stored.

    Attributes:
        path: of the folder.
        shape: (I, J, K) of each volume.
        dtype: `int16` holds intensities in steps of 0.001, `uint8` in 255 steps from its lowest to its highest (by the
            header's slope), `float32` as they are.
        compression: 1 (fast) to 9 (small) of `.nii.gz`; 0 writes `.nii`.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: Dtype = "int16"
    compression: int = 1

    @property
    def suffix(self) -> str:
        """Of the volumes."""
        return ".nii.gz" if self.compression else ".nii"

    def volume(self, name: str) -> Path:
        """Where a volume lies."""
        return self.path / f"{name}{self.suffix}"

    def sidecar(self, name: str) -> Path:
        """Where the file beside it lies."""
        return self.path / f"{name}.json"

    def names(self) -> list[str]:
        """The volumes that are there, in order."""
        return sorted(nifti_stem(path) for path in self.path.glob(f"[!.]*{self.suffix}"))

    def holds(self, name: str) -> bool:
        """Whether a volume is there, whole, with its sidecar."""
        return self.volume(name).is_file() and self._sound(self.volume(name)) and self.quality(name) is not None

    def quality(self, name: str) -> dict[str, Any] | None:
        """What was measured of a volume, from its sidecar; None if that is absent or damaged."""
        try:
            return read_json(self.sidecar(name))["Quality"]
        except (UserError, KeyError, TypeError):
            return None

    def _sound(self, path: Path) -> bool:
        """Whether a file is what `write` leaves, to its end: gzip compares its checksum there."""
        try:
            content = gzip.decompress(path.read_bytes()) if self.compression else path.read_bytes()
            header = nib.Nifti1Header.from_fileobj(io.BytesIO(content))
        except (OSError, EOFError, zlib.error, HeaderDataError, ImageFileError):
            return False
        dtype = np.dtype(self.dtype)
        whole = len(content) == _HEADER_BYTES + int(np.prod(self.shape)) * dtype.itemsize
        return whole and header.get_data_shape() == self.shape and header.get_data_dtype() == dtype

    def write(self, name: str, volume: np.ndarray, affine: np.ndarray, sidecar: dict[str, Any]) -> None:
        """Check a volume (I, J, K), intensity 1 at 1, and write it with its sidecar."""
        quality = check_volume(volume, voxel_ml=float(np.prod(spacing_of(affine))) / 1000)
        finite = np.nan_to_num(volume, nan=0.0, posinf=0.0, neginf=0.0) * INTENSITY_SCALE
        note = {
            **sidecar,
            "IntensityRange": [0, INTENSITY_SCALE],
            "QualityCheck": quality.problem or "passed",
            "Quality": quality.to_dict(),
        }
        write_json(self.sidecar(name), note)
        slope, intercept = _steps(finite) if self.dtype == "uint8" else (1.0, 0.0)
        save_volume(
            self.volume(name),
            finite,
            affine,
            dtype=np.dtype(self.dtype),
            slope=slope,
            intercept=intercept,
            compression=self.compression,
            header_description="neuromf synthetic" if sidecar["SyntheticImage"] else "neuromf reconstruction",
        )

    def finish(self, record: dict[str, Any], draw: bool) -> dict[str, str]:
        """Write the report of all volumes that are there, and the montage of the first.

        Call it when no process writes any more: what killed ones left half written is removed.

        Returns:
            What the check found, by name.
        """
        names = self.names()
        qualities = {name: self.quality(name) or {} for name in names}
        failed = {name: found["problem"] for name, found in qualities.items() if found.get("problem")}
        if draw and names:
            self._draw(names[:MONTAGE_VOLUMES])
        report = {**record, "complete": True, "n": len(names), "failed": failed, "volumes": qualities}
        write_json(self.path / REPORT, report)
        remove_leftovers(self.path)
        return failed

    def _draw(self, names: list[str]) -> None:
        spacing = spacing_of(nib.Nifti1Image.from_filename(self.volume(names[0])).affine)
        shown = [read_stored(self.volume(name)).clip(0, 1) for name in names]
        montage(shown, names, self.path / MONTAGE, spacing_mm=spacing)


def read_stored(path: Path) -> np.ndarray:
    """A volume as `decode` and `render` store it, (I, J, K) float32 with intensity 1 at 1; whatever it holds."""
    return np.asarray(nib.Nifti1Image.from_filename(path).dataobj, dtype=np.float32) / INTENSITY_SCALE


def _steps(volume: np.ndarray) -> tuple[float, float]:
    """(slope, intercept) that spread 0 ... 255 over a volume; as float32, since the header holds them so."""
    low, high = float(volume.min()), float(volume.max())
    return float(np.float32((high - low) / 255)) or 1.0, float(np.float32(low))
