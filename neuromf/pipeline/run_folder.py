"""The run folder: whose it is, what travels in it, and whether a call may go on in it."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from neuromf import __version__
from neuromf.config import TrainConfig, from_yaml
from neuromf.data.latents import LatentFolderInfo
from neuromf.errors import UserError
from neuromf.files import is_leftover, read_json, remove_leftovers, write_json, write_text
from neuromf.launch import process_count

CONFIG_FILE, DATA_FILE, ENVIRONMENT_FILE, RESULT_FILE = "config.yaml", "data.json", "environment.json", "result.json"
# These may change between two calls for one run: they do not touch what is learned.
FREE_TO_CHANGE = ("preset", "intervals", "guards", "tracking", "training.workers")


def check_folder(out: Path, config: TrainConfig, description: dict[str, Any]) -> None:
    """Refuse a folder that holds something else than this run; nothing is written.

    Raises:
        UserError: a file, a run of other settings or other latents, or no run at all.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, a run needs a folder", "give another --out")
    if (out / CONFIG_FILE).exists():
        _same_settings(out, config)
        before = read_json(out / DATA_FILE)
        if before["digest"] != description["digest"]:
            raise UserError(
                f"{out} was trained on other latents than {description['latents']}",
                "give the latents it was started with, or another --out",
            )
        bases = [(found.get("base") or {}).get("sha256", "none")[:12] for found in (before, description)]
        if bases[0] != bases[1]:
            raise UserError(
                f"{out} adapts a base with other weights: {bases[0]}... there, {bases[1]}... now",
                "give the base it was started with, or another --out",
            )
    elif out.exists() and not all(_expected(path) for path in out.iterdir()):
        raise UserError(f"{out} is not empty and is not a run folder", "give another --out")


def _expected(path: Path) -> bool:
    """Whether a file may lie in a folder that is not claimed yet: a bug's log, or what a killed `claim` left."""
    return path.name in {"neuromf-error.log", DATA_FILE} or is_leftover(path)


def claim(out: Path, config: TrainConfig, description: dict[str, Any]) -> None:
    """Write data.json, then config.yaml: from now on the folder is this run's. What a kill left half written goes."""
    remove_leftovers(out, below=True)
    write_json(out / DATA_FILE, description)
    write_text(out / CONFIG_FILE, config.to_yaml())


def describe_data(info: LatentFolderInfo, copies: int = 0) -> dict[str, Any]:
    """What of the latent folder travels with the run: statistics, split hash, preprocessing, autoencoder.

    Args:
        info: of the folder.
        copies: of each training scan that are trained on; with more of them it would be another run.
    """
    kept = {key: info.dataset.get(key) for key in ("latent_shape", "autoencoder", "preprocessing", "affine")}
    classes, pair = info.dataset.get("classes"), info.dataset.get("pair")
    description = {
        **kept,
        **({"pair": pair} if pair else {}),
        **({"classes": {key: classes[key] for key in ("column", "names")}} if classes else {}),
        "statistics": info.statistics.to_dict(),
        "split_hash": info.dataset["splits"]["hash"],
        "subjects": {name: len(subjects) for name, subjects in info.splits.items()},
        **({"copies": copies, "augmentation": info.dataset.get("augmentation")} if copies else {}),
    }
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
    return {**description, "digest": digest, "latents": str(info.folder.resolve())}


def _same_settings(out: Path, config: TrainConfig) -> None:
    old = _flat(from_yaml(out / CONFIG_FILE).model_dump(mode="json"))
    new = _flat(config.model_dump(mode="json"))
    changed = [
        f"  {key}: {old.get(key)} there, {new.get(key)} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(FREE_TO_CHANGE)
    ]
    if changed:
        raise UserError(
            f"{out} holds a run with other settings:\n" + "\n".join(changed),
            "give another --out, or the settings it was started with to resume it",
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value})
    return flat


def environment(config: TrainConfig, device: str) -> dict[str, Any]:
    """Versions, revision, device, seed and command line of this call."""
    packages = ("torch", "monai", "accelerate", "numpy", "nibabel", "safetensors")
    return {
        "neuromf": __version__,
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
        "git_revision": _git_revision(),
        "platform": platform.platform(),
        "device": device,
        "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "processes": process_count(),
        "seed": config.training.seed,
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _git_revision() -> str | None:
    try:
        return subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=5,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
