"""`neuromf train-autoencoder`: label maps and templates -> the weights of a small autoencoder, and their recipe.

The weights in `neuromf/assets` are the result of this command; `autoencoder_builtin.json` beside them is its recipe.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuromf.data.label_maps import load_label_map
from neuromf.data.phantom import phantom_labels
from neuromf.data.sources import Scan, find_scans
from neuromf.data.volumes import load_volume
from neuromf.errors import UserError
from neuromf.files import read_json, sha256_file, write_json
from neuromf.models.autoencoder import KLAutoencoder
from neuromf.models.kl_weights import write_weights
from neuromf.pipeline.autoencoder_data import Sources, build_pool, draw_volume
from neuromf.pipeline.autoencoder_fit import AutoencoderSettings, fit
from neuromf.pipeline.autoencoder_quality import latent_summary, measure

WEIGHTS = "autoencoder.safetensors"
RECIPE = "recipe.json"
SETTINGS = "settings.json"
_SHARD = 100  # volumes per file of the pool: what an interrupted run draws again at most
_PHANTOM_HEADS, _PHANTOM_SIZE, _PHANTOM_MM = 16, 128, 1.5
_HELD_BACK_SEED = 900_000  # of volumes that measure the result; training draws count up from 0
_HELD_BACK = 16

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TrainedAutoencoder:
    """The result of `train_autoencoder`: weights file and recipe (settings, data, measured quality)."""

    weights: Path
    recipe: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"weights": str(self.weights), **self.recipe}


def train_autoencoder(
    label_maps: Sequence[str | Path],
    out: str | Path,
    *,
    templates: Sequence[str | Path] = (),
    settings: AutoencoderSettings | None = None,
    tests: Mapping[str, Tensor] | None = None,
    log: Callable[[str], None] = lambda line: None,
    progress: Progress | None = None,
) -> TrainedAutoencoder:
    """Train an autoencoder and measure it; the same command again continues.

    Args:
        label_maps: NIfTI files, folders or globs, FreeSurfer/SynthSeg numbers.
        out: folder for the pool of training volumes, the checkpoint, the weights and the recipe.
        templates: T1-like volumes to train on as well.
        settings: see `AutoencoderSettings`.
        tests: named volumes (N, 1, I, J, K) to measure the result on, beside fresh draws of the training's kind.
        log: called with a line of text now and then.

    Raises:
        UserError: nothing to train on, or a folder with a run of other settings.
    """
    out = Path(out)
    settings = settings or AutoencoderSettings()
    maps = find_scans(label_maps) if label_maps else []
    scans = find_scans(templates) if templates else []
    if not maps and not scans and not settings.phantom_volumes:
        raise UserError("there is nothing to train on", "give label maps, --templates, or phantom volumes")
    data = {"label_maps": _digests(maps), "templates": _digests(scans)}
    _same_run(out, {"settings": settings.to_dict(), "data": data})

    sources = Sources([load_label_map(m.path) for m in maps], [load_volume(s.path) for s in scans])
    phantoms = Sources([_phantom(seed) for seed in range(_PHANTOM_HEADS)] if settings.phantom_volumes else [], [])
    pools: list[np.ndarray] = []
    if maps or scans:
        pools += _pool(out / "pool", sources, settings.pool_volumes, settings, progress)
    pools += _pool(out / "pool_phantoms", phantoms, settings.phantom_volumes, settings, progress)
    training = fit(pools, settings, out / "checkpoint.pt", log=log, progress=progress)

    weights = out / WEIGHTS
    write_weights(weights, training.ema, settings.architecture)
    held_back = _held_back(sources if maps or scans else phantoms, settings)
    recipe = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": _hardware(),
        "updates": training.update,
        "training_s": round(training.elapsed_s),
        "settings": settings.to_dict(),
        "data": data,
        "sha256": sha256_file(weights),
        **assess(KLAutoencoder("trained", weights), {"fresh training-like volumes": held_back, **(tests or {})}),
    }
    write_json(out / RECIPE, recipe)
    return TrainedAutoencoder(weights, recipe)


def assess(autoencoder: KLAutoencoder, sets: Mapping[str, Tensor]) -> dict[str, Any]:
    """Quality per set, and latent statistics: of the first half of each set, and of the second whitened by it."""
    halves = {name: volumes.split((len(volumes) + 1) // 2) for name, volumes in sets.items() if len(volumes) > 1}
    return {
        "quality": [row.to_dict() for row in measure(autoencoder, sets)],
        "latents": {name: latent_summary(autoencoder, *half) for name, half in halves.items()},
    }


def _pool(
    folder: Path, sources: Sources, count: int, settings: AutoencoderSettings, progress: Progress | None
) -> list[np.ndarray]:
    """Draw the volumes of a pool that are not there yet, in shards; returns memory maps."""
    shards = []
    for first in range(0, count, _SHARD):
        path = folder / f"{first // _SHARD:03d}.npy"
        size = min(_SHARD, count - first)
        if not path.exists():
            build_pool(sources, path, size, settings.seed, settings.pool, first=first)
        if progress is not None:
            progress(f"drawing {folder.name}", first + size, count)
        shards.append(np.load(path, mmap_mode="r"))
    return shards


def _phantom(seed: int) -> Any:
    return phantom_labels(seed, (_PHANTOM_SIZE,) * 3, _PHANTOM_MM)


def _held_back(sources: Sources, settings: AutoencoderSettings) -> Tensor:
    """Fresh volumes of the training's kind (the same anatomies in other poses and contrasts)."""
    seeds = range(_HELD_BACK_SEED, _HELD_BACK_SEED + _HELD_BACK)
    return torch.stack([draw_volume(sources, seed, settings.pool)[None] for seed in seeds])


def _same_run(out: Path, run: dict[str, Any]) -> None:
    """Refuse to continue a folder that another run began."""
    path = out / SETTINGS
    if path.exists():
        if read_json(path) != json.loads(json.dumps(run)):
            raise UserError(
                f"{out} holds a run with other settings or data", "choose another --out, or delete that folder"
            )
        return
    write_json(path, run)


def _digests(scans: Sequence[Scan]) -> dict[str, str]:
    return {scan.path.name: sha256_file(scan.path) for scan in scans}


def _hardware() -> str:
    cores = f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} threads"
    return f"{cores}, torch {torch.__version__}"
