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
from nibabel.orientations import io_orientation
from nibabel.spatialimages import HeaderDataError

from neuromf.data.bids import parse_name
from neuromf.data.pairs import MASK_ENDING
from neuromf.data.restoration import restore
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
        shape: (I, J, K) of each volume; None where each has its scan's.
        dtype: `int16` holds intensities in steps of 0.001, `uint8` in 255 steps from its lowest to its highest (by the
            header's slope), `float32` as they are.
        compression: 1 (fast) to 9 (small) of `.nii.gz`; 0 writes `.nii`.
        masked: each volume has a mask beside it.
    """

    path: Path
    shape: tuple[int, ...] | None
    dtype: Dtype = "int16"
    compression: int = 1
    masked: bool = False

    @property
    def suffix(self) -> str:
        """Of the volumes."""
        return ".nii.gz" if self.compression else ".nii"

    def volume(self, name: str) -> Path:
        """Where a volume lies."""
        return self.path / f"{name}{self.suffix}"

    def mask(self, name: str) -> Path:
        """Where the mask of a volume lies: `sub-gen000017_label-lesion_mask.nii.gz`."""
        return mask_beside(self.volume(name))

    def sidecar(self, name: str) -> Path:
        """Where the file beside it lies."""
        return self.path / f"{name}.json"

    def names(self) -> list[str]:
        """The volumes that are there, in order; masks are none."""
        names = sorted(nifti_stem(path) for path in self.path.glob(f"[!.]*{self.suffix}"))
        return [name for name in names if not (self.masked and name.endswith(MASK_ENDING))]

    def holds(self, name: str, origin: dict[str, Any] | None = None) -> bool:
        """Whether a volume is there, whole, with its sidecar, and of this origin."""
        if not (self.volume(name).is_file() and self._sound(self.volume(name), self.dtype)):
            return False
        if self.masked and not (self.mask(name).is_file() and self._sound(self.mask(name), "uint8")):
            return False
        note = self.note(name)
        return "Quality" in note and note.get("Source") == origin

    def note(self, name: str) -> dict[str, Any]:
        """What the sidecar of a volume says; empty if that is absent or damaged."""
        try:
            found = read_json(self.sidecar(name))
        except UserError:
            return {}
        return found if isinstance(found, dict) else {}

    def _sound(self, path: Path, stored: Dtype) -> bool:
        """Whether a file is what `write` leaves, to its end: gzip compares its checksum there."""
        try:
            content = gzip.decompress(path.read_bytes()) if self.compression else path.read_bytes()
            header = nib.Nifti1Header.from_fileobj(io.BytesIO(content))
        except (OSError, EOFError, zlib.error, HeaderDataError, ImageFileError):
            return False
        shape, dtype = header.get_data_shape(), np.dtype(stored)
        whole = len(content) == _HEADER_BYTES + int(np.prod(shape)) * dtype.itemsize
        return whole and shape == (self.shape or shape) and header.get_data_dtype() == dtype

    def write(
        self,
        name: str,
        volume: np.ndarray,
        affine: np.ndarray,
        sidecar: dict[str, Any],
        prepared: dict[str, Any] | None = None,
    ) -> None:
        """Check a volume (I, J, K), intensity 1 at 1, and write it with its sidecar.

        Args:
            name: of the volume.
            volume: on the grid of `affine`.
            affine: (4, 4).
            sidecar: what is known of it.
            prepared: how its scan was brought to that grid, to be undone: it is written on the scan's own voxels and
                intensities then.
        """
        quality = check_volume(volume, voxel_ml=float(np.prod(spacing_of(affine))) / 1000)
        finite = np.nan_to_num(volume, nan=0.0, posinf=0.0, neginf=0.0)
        if prepared is None:
            stored, span = finite * INTENSITY_SCALE, (0, INTENSITY_SCALE)
        else:
            stored, affine = restore(finite, prepared)
            span = (prepared["intensity"]["lower"], prepared["intensity"]["upper"])
        note = {
            **sidecar,
            "IntensityRange": list(span),
            "QualityCheck": quality.problem or "passed",
            "Quality": quality.to_dict(),
        }
        # One of another scan would else lie beside this sidecar if this process were killed now.
        self.volume(name).unlink(missing_ok=True)
        write_json(self.sidecar(name), note)
        slope, intercept = self._steps(stored, *span)
        save_volume(
            self.volume(name),
            stored,
            affine,
            dtype=np.dtype(self.dtype),
            slope=slope,
            intercept=intercept,
            compression=self.compression,
            header_description="neuromf synthetic" if sidecar["SyntheticImage"] else "neuromf reconstruction",
        )

    def write_mask(self, name: str, mask: np.ndarray, affine: np.ndarray) -> None:
        """Write the mask (I, J, K) of a volume, 1 inside, before the volume itself."""
        save_volume(self.mask(name), mask, affine, dtype=np.uint8, header_description="neuromf lesion mask")

    def finish(self, record: dict[str, Any], draw: bool) -> dict[str, str]:
        """Write the report of all volumes that are there, and the montage of the first.

        Call it when no process writes any more: what killed ones left half written is removed.

        Returns:
            What the check found, by name.
        """
        names = self.names()
        qualities = {name: self.note(name).get("Quality", {}) for name in names}
        failed = {name: found["problem"] for name, found in qualities.items() if found.get("problem")}
        if draw and names:
            self._draw(names[:MONTAGE_VOLUMES])
        report = {**record, "complete": True, "n": len(names), "failed": failed, "volumes": qualities}
        write_json(self.path / REPORT, report)
        remove_leftovers(self.path)
        return failed

    def _steps(self, stored: np.ndarray, low: float, high: float) -> tuple[float, float]:
        """(slope, intercept) of a volume whose intensities 0 and 1 are `low` and `high`; the header has them so."""
        if self.dtype == "float32":
            return 1.0, 0.0
        if self.dtype == "int16":
            return float(np.float32((high - low) / INTENSITY_SCALE)), float(np.float32(low))
        lowest, highest = float(stored.min()), float(stored.max())
        return float(np.float32((highest - lowest) / 255)) or 1.0, float(np.float32(lowest))

    def _draw(self, names: list[str]) -> None:
        images = [nib.Nifti1Image.from_filename(self.volume(name)) for name in names]
        images = [image.as_reoriented(io_orientation(image.affine)) for image in images]
        shown = []
        for name, image in zip(names, images, strict=True):
            low, high = self.note(name).get("IntensityRange", (0, INTENSITY_SCALE))
            shown.append(((np.asarray(image.dataobj, dtype=np.float32) - low) / (high - low)).clip(0, 1))
        files = [self.mask(name) for name in names] if self.masked else None
        masks = [np.asarray(nib.Nifti1Image.from_filename(file).dataobj) > 0 for file in files] if files else None
        montage(shown, names, self.path / MONTAGE, spacing_mm=spacing_of(images[0].affine), masks=masks)


def mask_beside(image: Path) -> Path:
    """Where the mask of an image lies by BIDS, `sub-X_label-lesion_mask.nii.gz` beside `sub-X_T1w.nii.gz`.

    An image that is not named by BIDS keeps its name before the ending.
    """
    stem = nifti_stem(image)
    named = parse_name(image.name)
    stem = stem.removesuffix(f"_{named.suffix}") if named else stem
    return image.with_name(f"{stem}{MASK_ENDING}{image.name[len(nifti_stem(image)) :]}")


def read_stored(path: Path) -> np.ndarray:
    """A volume as `decode` and `render` store it, (I, J, K) float32 with intensity 1 at 1; whatever it holds."""
    return np.asarray(nib.Nifti1Image.from_filename(path).dataobj, dtype=np.float32) / INTENSITY_SCALE
