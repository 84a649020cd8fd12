"""Volumes for a page: the fixed-noise samples of a run, decoded, or the NIfTI files of a set."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuromf.data.latents import LatentStatistics
from neuromf.data.volume_sets import first_grid, read_volume_set
from neuromf.data.volumes import NIFTI_SUFFIXES, load_volume, nifti_stem
from neuromf.errors import UserError
from neuromf.generator import matching_autoencoder
from neuromf.models.mask_codec import PairLayout
from neuromf.pipeline.pages.collected import VOLUME_BYTES, Wanted, count, part
from neuromf.pipeline.volume_folder import MASK_ENDING, mask_beside
from neuromf.reporting.page import Block, Item, Missing, Volumes
from neuromf.reporting.sprites import sprites

SHOWN = 8
# Decoding whole heads takes seconds each on a GPU and a minute on a CPU.
_DECODED_VOXELS = 24_000_000
SYNTHETIC = "Made by a generative model: it shows no real person, and is not for clinical use."


def newest_samples(run: Path) -> tuple[int, dict[int, Tensor]] | None:
    """(epoch, whitened latents (B, C, I, J, K) by number of evaluations) of the samples drawn last.

    Raises:
        UserError: the file is damaged.
    """
    files = sorted((run / "samples" / "generated_samples").glob("epoch_*.pt"))
    if not files:
        return None
    try:
        content = torch.load(files[-1], weights_only=True, map_location="cpu")
        samples = {int(name.removeprefix("nfe_")): latents.float() for name, latents in content.items()}
        epoch = int(files[-1].stem.removeprefix("epoch_"))
    except Exception as error:  # a damaged file makes the unpickler raise nearly any type
        raise UserError(f"{files[-1]} is not readable: {str(error).splitlines()[0]}") from error
    return epoch, samples


def run_volumes(run: Path, data: Mapping[str, Any], wanted: Wanted) -> list[Block]:
    """The run's samples of noise that never changes, decoded: those with the fewest and the most evaluations."""
    try:
        found = newest_samples(run)
        if found is None or not data:
            return [
                Missing("No samples yet: they are drawn every intervals.samples epochs, and at the end of the run.")
            ]
        epoch, samples = found
        shown = {nfe: samples[nfe] for nfe in sorted({min(samples), max(samples)})}
        volumes = _decoded(shown, data, wanted)
    except UserError as error:
        return [Missing(f"The samples are not shown: {error.message}.", error.hint)]
    left = sum(map(len, shown.values())) - len(volumes)
    note = f"Epoch {epoch}. {SYNTHETIC}" + (f" {left} more are not decoded here." if left else "")
    kinds = [{"sample": str(n + 1), "evaluations": str(nfe)} for n, nfe in volumes]
    return [_viewer(f"Samples of epoch {epoch}", kinds, list(volumes.values()), _spacing(data), note)]


def _decoded(
    samples: Mapping[int, Tensor], data: Mapping[str, Any], wanted: Wanted
) -> dict[tuple[int, int], np.ndarray]:
    """Volumes (I, J, K) by (sample, evaluations); as many as are decoded in reasonable time, at least one of each."""
    autoencoder = matching_autoencoder(dict(data["autoencoder"]), weights=wanted.weights, device=wanted.device)
    statistics, pair = LatentStatistics.from_dict(data["statistics"]), PairLayout.of(data)
    voxels = math.prod(data["latent_shape"][1:]) * autoencoder.factor**3
    n = max(1, min(SHOWN, _DECODED_VOXELS // voxels) // len(samples))
    pairs = [(sample, nfe) for sample in range(n) for nfe, latents in samples.items() if sample < len(latents)]
    volumes = {}
    for done, (sample, nfe) in enumerate(pairs, 1):
        raw = statistics.unwhiten(samples[nfe][sample : sample + 1]).to(autoencoder.device)
        image = raw if pair is None else pair.image(raw)
        volumes[sample, nfe] = autoencoder.decode(image).float().cpu().numpy()[0, 0]
        wanted.progress("decoding samples", done, len(pairs))
    return volumes


def _spacing(data: Mapping[str, Any]) -> tuple[float, ...]:
    spacing = part(data, "preprocessing").get("spacing_mm")
    return tuple(spacing) if isinstance(spacing, list) else (1.0, 1.0, 1.0)


def nifti_files(folder: Path) -> list[Path]:
    """The volumes that lie in a folder itself, in order; masks beside them left out."""
    files = (path for path in folder.glob("[!.]*") if path.name.lower().endswith(NIFTI_SUFFIXES) and path.is_file())
    return sorted(path for path in files if not nifti_stem(path).endswith(MASK_ENDING))


def set_volumes(folder: Path, wanted: Wanted) -> list[Block]:
    """The first volumes of a folder of NIfTI files."""
    files = nifti_files(folder)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            grid = first_grid(files)
            tell = partial(wanted.progress, "reading volumes")
            read = read_volume_set(files[:SHOWN], grid, scratch=Path(scratch), progress=tell)
            wanted.remarks += [entry["reason"] for entry in read.refused]
            kinds = [{"volume": nifti_stem(path)} for path in read.paths]
            note = f"{count(len(read), 'volume')} of {len(files)}; {grid}."
            masks = [load_volume(mask).array > 0 for path in read.paths if (mask := mask_beside(path)).is_file()]
            return [_viewer("Volumes", kinds, list(read.array), grid.spacing_mm, note, masks)]
    except UserError as error:
        return [Missing(f"The volumes are not shown: {error.message}.", error.hint)]


def _viewer(
    label: str,
    kinds: Sequence[Mapping[str, str]],
    volumes: Sequence[np.ndarray],
    spacing_mm: Sequence[float],
    note: str,
    masks: Sequence[np.ndarray] = (),
) -> Volumes:
    """Volumes to look at; with masks where each has one of its shape."""
    paired = [mask.shape for mask in masks] == [volume.shape[-3:] for volume in volumes]
    carried = sprites([*volumes, *(masks if paired else ())], VOLUME_BYTES, spacing_mm=spacing_mm)
    tints = carried.items[len(volumes) :] if paired else [None] * len(volumes)
    items = [Item(*parts) for parts in zip(kinds, carried.items[: len(volumes)], tints, strict=True)]
    return Volumes(label, items, " ".join(filter(None, (note, carried.note))))
