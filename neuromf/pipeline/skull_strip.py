"""Where the brain is: by a program on the path, or by the small network `mindgrab`; and the scan without the rest."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import nibabel as nib
import numpy as np
from scipy import ndimage

from neuromf.data.volumes import Volume, save_volume
from neuromf.errors import ScanError, UserError, did_you_mean

if TYPE_CHECKING:
    import torch

    from neuromf.models.meshnet import LoadedMeshNet

Method = Literal["none", "synthstrip", "hd-bet", "mindgrab"]
METHODS: tuple[str, ...] = get_args(Method)
PLAUSIBLE_ML = (700.0, 2200.0)
"""Brains outside are worth a look; adults have 1000 to 1700 ml within the skull."""
_SAID = 3


class SkullStripper(Protocol):
    """Something that finds brains."""

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for two maskings to be the same; plain values."""

    def mask(self, volume: Volume) -> np.ndarray:
        """Where the brain is, (I, J, K) bool.

        Raises:
            ScanError: this scan cannot be masked.
        """


def skull_stripper(method: str, device: torch.device | str = "cpu") -> SkullStripper | None:
    """The skull stripper of a name, ready to work; None for "none".

    Raises:
        UserError: no such method, or its program or weights are not here.
    """
    if method == "none":
        return None
    if method == "mindgrab":
        return _MindGrab(device)
    if method == "synthstrip":
        return _Program(method, "mri_synthstrip", "-i", "{scan}", "-m", "{result}")
    if method == "hd-bet":
        # Version 1 takes "cuda" for a number; both use a GPU unless told otherwise.
        cpu = ("-device", "cpu") if str(device).startswith("cpu") else ()
        return _Program(method, "hd-bet", "-i", "{scan}", "-o", "{result}", *cpu)
    raise UserError(f"no skull stripping '{method}'", did_you_mean(method, METHODS))


def stripped(volume: Volume, mask: np.ndarray) -> Volume:
    """The scan with its own minimum wherever there is no brain."""
    return volume._replace(array=np.where(mask, volume.array, volume.array.min()))


def read_mask(path: str | Path, volume: Volume) -> np.ndarray | None:
    """Where a file is not zero, (I, J, K) bool; None if it cannot be read or has another grid than the scan."""
    try:
        image = nib.Nifti1Image.from_filename(path)
        found = np.asanyarray(image.dataobj) != 0
    except Exception:  # damaged files make nibabel raise nearly any type
        return None
    same = found.shape == volume.array.shape and np.allclose(image.affine, volume.affine, atol=1e-3)
    return found if same else None


def brain_ml(mask: np.ndarray, affine: np.ndarray) -> float:
    """Volume of a mask in ml."""
    return float(mask.sum() * abs(np.linalg.det(np.asarray(affine)[:3, :3])) * 1e-3)


class _MindGrab:
    """The network of brainchop, on the CPU or a GPU; processes that are given one load the network themselves."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = device
        self.identity: dict[str, Any] = {"method": "mindgrab", "weights": self._loaded.weights.to_dict()}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_loaded"}

    @cached_property
    def _loaded(self) -> LoadedMeshNet:
        from neuromf.models.meshnet import load_meshnet

        return load_meshnet("mindgrab", device=self._device)

    def mask(self, volume: Volume) -> np.ndarray:
        from neuromf.pipeline.segmentation import segment

        return ndimage.binary_fill_holes(segment(volume, self._loaded).labels > 0)


class _Program:
    """A program of others, given a file of the scan and asked for one that is zero outside the brain."""

    def __init__(self, method: str, program: str, *arguments: str) -> None:
        self._program, self._arguments = program, arguments
        self.identity: dict[str, Any] = {"method": method, "program": program}
        if shutil.which(program) is None:
            raise UserError(
                f"--skull-strip {method} needs the program {program}, which is not on the path",
                f"install it, or add its folder to PATH; on this machine: {' or '.join(_others(method))}",
            )

    def mask(self, volume: Volume) -> np.ndarray:
        with tempfile.TemporaryDirectory(prefix="neuromf-strip-") as folder:
            files = {"scan": str(Path(folder) / "scan.nii.gz"), "result": str(Path(folder) / "result.nii.gz")}
            save_volume(files["scan"], volume.array, volume.affine)
            self._run([word.format(**files) for word in self._arguments])
            found = read_mask(files["result"], volume)
        if found is None:
            raise ScanError(
                f"{self._program} ended well, and its result is missing or on another grid",
                "run it on this scan by hand",
            )
        # HD-BET gives the brain itself; dark voxels within it are filled.
        return ndimage.binary_fill_holes(found)

    def _run(self, arguments: Sequence[str]) -> None:
        try:
            done = subprocess.run(
                [self._program, *arguments], capture_output=True, text=True, errors="replace", check=False
            )
        except OSError as error:
            raise UserError(f"{self._program} cannot be started ({error.strerror})", "check its rights") from error
        if done.returncode:
            said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()][-_SAID:]
            raise ScanError(
                f"{self._program} ended with status {done.returncode}: {' / '.join(said) or 'it said nothing'}",
                "run it on this scan by hand",
            )


def _others(method: str) -> list[str]:
    programs = {"synthstrip": "mri_synthstrip", "hd-bet": "hd-bet"}
    there = [name for name, program in programs.items() if name != method and shutil.which(program)]
    return [f"--skull-strip {name}" for name in (*there, "mindgrab", "none")]
