"""Latents to decode, wherever they come from: each with its name, the affine of its volume and what a sidecar says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from neuromf import __version__
from neuromf.data.latents import LatentFolderInfo, latent_path, load_latent, load_latent_folder_info
from neuromf.errors import UserError
from neuromf.models.mask_codec import PairLayout
from neuromf.pipeline.sample_folder import (
    MANIFEST,
    identity,
    load_sample,
    read_manifest,
    sample_indices,
    sample_name,
    sample_path,
)


class Item(NamedTuple):
    """One latent (C, I, J, K) on its way to a file; `prepared` says how its scan was brought to the grid."""

    name: str
    latent: Tensor
    affine: np.ndarray
    sidecar: dict[str, Any]
    prepared: dict[str, Any] | None = None


class Samples:
    """What `neuromf sample` made, or is making; a sample's number is its index.

    Args:
        folder: of the samples.
        manifest: of that folder.
        numbers: None takes those whose latents are there.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], numbers: Sequence[int] | None = None) -> None:
        self.folder, self.manifest = folder, manifest
        self.autoencoder: dict[str, Any] = manifest["autoencoder"]
        self.latent_shape: tuple[int, ...] = tuple(manifest["latent_shape"])
        self.pair = PairLayout.of(manifest)
        self.identity: dict[str, Any] = {"samples": identity(manifest)}
        self.numbers: Sequence[int] = sample_indices(folder) if numbers is None else numbers

    def name(self, number: int) -> str:
        """`sample_000017`; of a pair the image's name by BIDS, `sub-gen000017_T1w`."""
        return sample_name(number) if self.pair is None else f"sub-gen{number:06d}_{self.pair.suffix}"

    def origin(self, number: int) -> dict[str, Any] | None:
        """None: beside its number, a sample has all that it depends on in common with its folder."""
        return None

    def item(self, number: int) -> Item:
        """Read a latent."""
        return self.of(number, load_sample(sample_path(self.folder, number))[1])

    def of(self, number: int, latent: Tensor) -> Item:
        """The item of a latent that may never have been in a file."""
        made = self.manifest
        sidecar = {
            "SyntheticImage": True,
            "Description": "made by a generative model; shows no real person, not for clinical use",
            "Modality": "MR",
            "GeneratedBy": [{"Name": "neuromf", "Version": __version__}],
            "Model": made["model"],
            "Objective": made["objective"],
            "Seed": made["seed"],
            "Index": number,
            "NFE": made["nfe"],
            "Solver": made["solver"],
            "Condition": made.get("condition"),
        }
        return Item(self.name(number), latent, _affine(made.get("affine")), sidecar)


class Encoded:
    """What `neuromf encode` made: real scans, to be seen as the autoencoder sees them; numbered in order of names."""

    def __init__(self, info: LatentFolderInfo) -> None:
        self.info = info
        self.subjects = sorted(subject for names in info.splits.values() for subject in names)
        self.autoencoder: dict[str, Any] = info.dataset["autoencoder"]
        self.latent_shape: tuple[int, ...] = tuple(info.dataset["latent_shape"])
        self.pair = PairLayout.of(info.dataset)
        steps = {key: info.dataset.get(key) for key in ("preprocessing", "cleaning")}
        self.identity: dict[str, Any] = {"encoded": steps}
        self.numbers: Sequence[int] = range(len(self.subjects))

    def name(self, number: int) -> str:
        """The subject."""
        return self.subjects[number]

    def origin(self, number: int) -> dict[str, Any] | None:
        """Name and hash of the scan's file: another one of the same name makes another volume."""
        return load_latent(latent_path(self.info.folder, self.subjects[number]), mmap=True)["metadata"].get("input")

    def item(self, number: int) -> Item:
        """Read a latent; its volume lies where the scan's own crop lay, so that it overlays the scan."""
        subject = self.subjects[number]
        latent = load_latent(latent_path(self.info.folder, subject))
        metadata = latent["metadata"]
        sidecar = {
            "SyntheticImage": False,
            "Description": "reconstruction of a real scan by the autoencoder",
            "Modality": "MR",
            "GeneratedBy": [{"Name": "neuromf", "Version": __version__}],
            "Source": metadata.get("input"),
        }
        prepared = metadata["preprocessing"]
        return Item(subject, latent["z"], _affine(prepared["affine"]), sidecar, prepared)


def read_source(folder: Path) -> Samples | Encoded:
    """The latents of a folder that `sample` or `encode` wrote.

    Raises:
        UserError: it holds none.
    """
    if not (folder / MANIFEST).is_file():
        return Encoded(load_latent_folder_info(folder))
    samples = Samples(folder, read_manifest(folder))
    if not samples.numbers:
        volumes = folder / "volumes"
        hint = f"they were decoded without: see {volumes}" if volumes.is_dir() else "run `neuromf sample` first"
        raise UserError(f"{folder} holds no latents", hint)
    return samples


def _affine(recorded: Any) -> np.ndarray:
    """The grid's affine; where scans kept their own spacing there is none, and 1 mm is assumed."""
    return np.eye(4) if recorded is None else np.asarray(recorded, dtype=float)
