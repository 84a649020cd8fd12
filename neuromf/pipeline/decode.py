"""`neuromf decode`: latents in, NIfTI volumes with sidecars, a montage and a quality report out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from neuromf import __version__
from neuromf.data.latents import latent_path, load_latent, load_latent_folder_info
from neuromf.data.preprocessing import head_mask
from neuromf.data.volumes import save_volume, spacing_of
from neuromf.errors import UserError
from neuromf.files import remove_leftovers, write_json
from neuromf.generator import matching_autoencoder
from neuromf.pipeline.sample import MANIFEST, load_sample, read_manifest
from neuromf.reporting.figures import montage as draw_montage

Progress = Callable[[str, int, int], None]
INTENSITY_SCALE = 1000
"""Stored value of intensity 1 (the 99.5th percentile): int16, as NVIDIA's MAISI writes MR."""
MONTAGE_VOLUMES = 16
WRITERS = 2


class Item(NamedTuple):
    """One latent to decode: its output name, how to read it, and what the sidecar says about it."""

    name: str
    read: Callable[[], Tensor]
    sidecar: dict[str, Any]


class DecodeReport(NamedTuple):
    """What was decoded; `failed` maps a volume's name to what the quality check found."""

    out: Path
    n: int
    made: int
    failed: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**self._asdict(), "out": str(self.out)}


def decode(
    latents: Path,
    out: Path | None = None,
    *,
    autoencoder: str | None = None,
    weights: Path | None = None,
    batch_size: int = 2,
    device: str = "auto",
    montage: bool = True,
    progress: Progress | None = None,
) -> DecodeReport:
    """Decode the samples of `neuromf sample`, or the encoded latents of `neuromf encode`, to `.nii.gz`.

    Args:
        latents: a folder with manifest.json or dataset.json.
        out: `<latents>/volumes` when None; volumes already there are kept.
        autoencoder: name or path, if it is not the one the latents name; its hash must agree all the same.
        weights: its weights file.
        batch_size: volumes decoded at once.
        montage: also draw `montage.png` of the first 16.
        progress: callback (description, done, total).

    Raises:
        UserError: no latents there, or an autoencoder with another hash.
    """
    recorded, affine, items = _items(Path(latents))
    if autoencoder is not None:
        recorded = {**recorded, "name": autoencoder}
    model = matching_autoencoder(recorded, weights=weights, device=device)
    made_with = {"name": model.name, "sha256": model.sha256, "licence": model.licence}
    folder = out or Path(latents) / "volumes"
    remove_leftovers(folder)
    missing = [item for item in items if not _volume_path(folder, item).is_file()]
    done = len(items) - len(missing)
    failed: dict[str, str] = {}
    with ThreadPoolExecutor(WRITERS) as writers:
        pending: list[tuple[Item, Future[str]]] = []
        for block in _blocks(missing, batch_size):
            z = torch.stack([item.read() for item in block]).to(model.device)
            volumes = model.decode(z).float().cpu().numpy()
            pending += [
                (item, writers.submit(_write, folder, item, v, affine, made_with))
                for item, v in zip(block, volumes, strict=True)
            ]
            while len(pending) > 4 * WRITERS:  # writing overlaps decoding, without holding many volumes
                _collect(pending.pop(0), failed)
            done += len(block)
            if progress:
                progress("decoding", done, len(items))
        for job in pending:
            _collect(job, failed)
    if montage:
        _draw(folder, items, affine)
    write_json(folder / "decode_report.json", {"n": len(items), "autoencoder": recorded, "failed": failed})
    return DecodeReport(folder, len(items), len(missing), failed)


def read_stored(path: Path) -> np.ndarray:
    """A volume as `decode` and `render` store it, (I, J, K) float32 with intensity 1 at 1; whatever it holds."""
    return np.asarray(nib.Nifti1Image.from_filename(path).dataobj, dtype=np.float32) / INTENSITY_SCALE


def check_volume(volume: np.ndarray) -> str:
    """What is wrong with a decoded volume, or "" (finite, not empty, range, head size within bounds)."""
    if not np.isfinite(volume).all():
        return f"{100 * (1 - np.isfinite(volume).mean()):.2g} % of the voxels are not finite"
    if volume.max() - volume.min() < 0.05:
        return f"empty: intensities lie between {volume.min():.3g} and {volume.max():.3g}"
    if volume.max() > 5 or volume.min() < -2:
        return f"out of range: intensities lie between {volume.min():.3g} and {volume.max():.3g}"
    share = float(head_mask(volume).mean())
    return "" if 0.02 < share < 0.98 else f"the head covers {100 * share:.1f} % of the volume"


def _items(latents: Path) -> tuple[dict[str, Any], np.ndarray, list[Item]]:
    """(autoencoder record, affine, items) of a folder of samples or of encoded latents."""
    if (latents / MANIFEST).is_file():
        manifest = read_manifest(latents)
        paths = sorted((latents / "latents").glob("sample_*.pt"))
        if not paths:
            raise UserError(f"{latents} holds no samples yet", "run `neuromf sample` first")
        items = [Item(path.stem, partial(_generated, path), _sidecar(manifest, path)) for path in paths]
        return manifest["autoencoder"], _affine(manifest), items
    info = load_latent_folder_info(latents)
    subjects = sorted(subject for names in info.splits.values() for subject in names)
    note = {"SyntheticImage": False, "Description": "reconstruction of a real scan by the autoencoder"}
    items = [Item(subject, partial(_encoded, latent_path(latents, subject)), note) for subject in subjects]
    return info.dataset["autoencoder"], _affine(info.dataset), items


def _affine(record: dict[str, Any]) -> np.ndarray:
    """The training grid's affine; where scans kept their own spacing there is none, and 1 mm is assumed."""
    return np.asarray(record["affine"], dtype=float) if record.get("affine") is not None else np.eye(4)


def _sidecar(manifest: dict[str, Any], path: Path) -> dict[str, Any]:
    return {
        "SyntheticImage": True,
        "Description": "made by a generative model; shows no real person, not for clinical use",
        "GeneratedBy": [{"Name": "neuromf", "Version": __version__}],
        "Model": manifest["model"],
        "Objective": manifest["objective"],
        "Seed": manifest["seed"],
        "Index": int(path.stem.rpartition("_")[2]),
        "NFE": manifest["nfe"],
        "Solver": manifest["solver"],
        "Condition": manifest.get("condition"),
    }


def _blocks(items: list[Item], size: int) -> Iterator[list[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _generated(path: Path) -> Tensor:
    return load_sample(path)[1]


def _encoded(path: Path) -> Tensor:
    return load_latent(path)["z"]


def _volume_path(folder: Path, item: Item) -> Path:
    return folder / f"{item.name}.nii.gz"


def _write(folder: Path, item: Item, volume: np.ndarray, affine: np.ndarray, made_with: dict[str, Any]) -> str:
    problem = check_volume(volume[0])
    sidecar = {
        **item.sidecar,
        "Autoencoder": made_with,
        "IntensityRange": [0, INTENSITY_SCALE],
        "QualityCheck": problem or "passed",
    }
    write_json(folder / f"{item.name}.json", sidecar)
    finite = np.nan_to_num(volume[0], nan=0.0, posinf=0.0, neginf=0.0)
    description = "neuromf synthetic" if item.sidecar["SyntheticImage"] else "neuromf reconstruction"
    save_volume(
        _volume_path(folder, item), finite * INTENSITY_SCALE, affine, dtype=np.int16, header_description=description
    )
    return problem


def _collect(job: tuple[Item, Future[str]], failed: dict[str, str]) -> None:
    item, future = job
    if problem := future.result():
        failed[item.name] = problem


def _draw(folder: Path, items: list[Item], affine: np.ndarray) -> None:
    shown = items[:MONTAGE_VOLUMES]
    volumes = [read_stored(_volume_path(folder, item)) for item in shown]
    titles = [item.name for item in shown]
    draw_montage([v.clip(0, 1) for v in volumes], titles, folder / "montage.png", spacing_mm=spacing_of(affine))
