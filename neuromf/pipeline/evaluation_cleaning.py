"""Real scans cleaned as the training scans were: what `encode` recorded is done again, by the masks it kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neuromf.data.bias_field import BiasCorrection
from neuromf.data.volumes import Volume
from neuromf.errors import ScanError, UserError
from neuromf.files import sha256_file
from neuromf.pipeline.cleaning import MASKS_FOLDER, Cleaning
from neuromf.pipeline.skull_strip import SkullStripper, skull_stripper

_STEPS = ("skull_strip", "bias_field")


@dataclass(frozen=True)
class AsEncoded:
    """Cleans a scan as its latent's was.

    Attributes:
        cleaning: the recorded steps.
        masks: folder of the brain masks that `encode` kept; one of the same scan and method is used again.
        subjects: name of each scan, by its path.
    """

    cleaning: Cleaning
    masks: Path
    subjects: Mapping[Path, str]

    def __call__(self, volume: Volume, path: Path) -> Volume:
        """The scan, cleaned.

        Raises:
            ScanError: its mask is not there and cannot be drawn, no brain is found, or N4 fails.
        """
        return self.cleaning(volume, self.masks / f"{self.subjects[path]}.nii.gz", sha256_file(path)).volume


def as_encoded(
    latents: Path, recorded: Mapping[str, Any] | None, subjects: Mapping[Path, str], device: torch.device | str
) -> AsEncoded | None:
    """What was done to the scans of a latent folder before preprocessing; None where nothing was.

    Args:
        latents: the folder.
        recorded: `cleaning` of its dataset.json.
        subjects: name of each scan that will be cleaned, by its path.
        device: of a network that draws masks which are not there.

    Raises:
        UserError: a step that this version does not know, or N4 without SimpleITK.
    """
    if not recorded:
        return None
    if unknown := sorted(set(recorded) - set(_STEPS)):
        raise UserError(
            f"the scans of {latents} were cleaned by {', '.join(unknown)}, which this version does not know",
            "evaluate with the version of neuromf that encoded them",
        )
    strip, bias = (recorded.get(step) for step in _STEPS)
    stripper = _Recorded(dict(strip), str(device)) if strip else None
    correction = None
    if bias:
        correction = BiasCorrection(tuple(bias["iterations"]), bias["convergence"], bias["working_mm"])
        _ = correction.identity  # asks whether SimpleITK is there
    return AsEncoded(Cleaning(stripper, correction), Path(latents) / MASKS_FOLDER, dict(subjects))


class _Recorded:
    """The skull stripper of a record: kept masks need nothing, others its program or weights."""

    def __init__(self, identity: dict[str, Any], device: str) -> None:
        self.identity, self._device = identity, device

    def mask(self, volume: Volume) -> np.ndarray:
        return self._stripper.mask(volume)

    @cached_property
    def _stripper(self) -> SkullStripper:
        """The method itself.

        Raises:
            ScanError: it is not here, or is not what it was.
        """
        try:
            found = skull_stripper(self.identity["method"], self._device)
        except UserError as error:
            raise ScanError(
                f"its brain mask is not among those that `neuromf encode` kept, and cannot be drawn: {error.message}",
                error.hint,
            ) from error
        if found is None or found.identity != self.identity:
            raise ScanError(
                "its brain mask is not among those that `neuromf encode` kept, and"
                f" {self.identity['method']} is another one here than then",
                "evaluate where the scans were encoded, or keep its folder masks/",
            )
        return found
