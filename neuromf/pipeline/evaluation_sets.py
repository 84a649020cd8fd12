"""Which volumes `evaluate` compares, worked out from what earlier steps left beside them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from neuromf.data.bids import Selection
from neuromf.data.latents import LatentStatistics, load_latent_folder_info
from neuromf.data.pairs import image_files
from neuromf.data.preprocessing import Preprocessing
from neuromf.data.sources import find_scans
from neuromf.errors import UserError
from neuromf.pipeline.evaluate import GeneratedLatents
from neuromf.pipeline.evaluation_cleaning import AsEncoded, as_encoded
from neuromf.pipeline.sample_folder import MANIFEST, read_manifest


class HeldBack(NamedTuple):
    """The scans behind a latent folder, by what training did with them, and how they were cleaned and prepared."""

    real: list[Path]
    train: list[Path]
    preprocessing: Preprocessing
    clean: AsEncoded | None = None


def held_back(scans: Path, latents: Path, device: torch.device | str = "cpu") -> HeldBack:
    """Sort scans into those training saw and those it did not (validation and test), by the latents' splits.

    Args:
        scans: what the latents were encoded from: a folder, a BIDS dataset or a table.
        latents: written by `neuromf encode`.
        device: of a network that draws brain masks, where the latents are of stripped scans and masks are missing.

    Raises:
        UserError: not latents, none of the held-back subjects is among the scans, or the scans cannot be cleaned as
            the latents' were.
    """
    info = load_latent_folder_info(latents)
    selection = Selection.from_dict(info.dataset.get("selection"))
    images = image_files(scans, scans / "masks") if (scans / "masks").is_dir() else [scans]
    paths = {scan.subject: scan.path for scan in find_scans(images, selection)}
    real = [paths[s] for split in ("val", "test") for s in info.splits[split] if s in paths]
    if not real:
        raise UserError(
            f"none of the subjects that {latents} holds back is in {scans}",
            "give the folder of scans that `neuromf encode` was given",
        )
    train = [paths[s] for s in info.splits["train"] if s in paths]
    clean = as_encoded(latents, info.dataset.get("cleaning"), {path: name for name, path in paths.items()}, device)
    return HeldBack(real, train, Preprocessing.from_dict(info.dataset["preprocessing"]), clean)


def generated_latents(volumes: Path) -> GeneratedLatents | None:
    """The latents that `<samples>/volumes` were decoded from, with the training statistics; None if not there."""
    samples = Path(volumes).parent
    if not (samples / MANIFEST).is_file() or not (samples / "latents").is_dir():
        return None
    statistics = LatentStatistics.from_dict(read_manifest(samples)["statistics"])
    return GeneratedLatents(samples / "latents", statistics)
