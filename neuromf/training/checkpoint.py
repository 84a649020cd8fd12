"""Checkpoints: whole or absent, checksummed, rotated.

`checkpoints/step_XXXXXXXX/` holds `model.safetensors`, one `ema_<decay>.safetensors` per average, `state.pt`
(optimiser, guards, the unfinished epoch) and `checkpoint.json` (update count, SHA-256 of the others). The folder is
made under another name and renamed, so a killed run leaves the one before.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from neuromf.errors import UserError
from neuromf.files import atomic_path, read_json, remove_leftovers, sha256_file, write_json

FOLDER = "checkpoints"
FORMAT = 1


class Checkpoint(NamedTuple):
    """What a run needs to go on. `averages` maps a decay such as "0.9995" to weights."""

    update: int
    model: dict[str, Tensor]
    averages: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def folder_of(run: Path, update: int) -> Path:
    """Where the checkpoint after `update` updates lies."""
    return run / FOLDER / f"step_{update:08d}"


def save(run: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint and drop the older ones beyond `keep`.

    Returns:
        Its folder.
    """
    target = folder_of(run, checkpoint.update)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent)
    with atomic_path(target) as folder:
        folder.mkdir()
        _save_weights(folder / "model.safetensors", checkpoint.model)
        for decay, weights in checkpoint.averages.items():
            _save_weights(folder / f"ema_{decay}.safetensors", weights)
        torch.save(checkpoint.state, folder / "state.pt")
        digests = {path.name: sha256_file(path) for path in sorted(folder.iterdir())}
        write_json(
            folder / "checkpoint.json",
            {"format": FORMAT, "update": checkpoint.update, "averages": list(checkpoint.averages), "sha256": digests},
        )
    # Later ones can only be damaged ones that a resume passed over: they must not crowd out the good.
    whole = [folder for folder in sorted(target.parent.glob("step_*")) if folder.name <= target.name]
    for old in whole[:-keep]:
        shutil.rmtree(old)
    return target


def _save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    try:
        save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, path)
    except SafetensorError as error:
        # Its writer reports a full disk in words only; `atomic_path` tells it to the user by its number.
        if found := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
        raise


def intact(folder: Path) -> bool:
    """Whether every file of a checkpoint is there and has the content it was written with."""
    try:
        digests = read_json(folder / "checkpoint.json")["sha256"]
        return all(sha256_file(folder / name) == digest for name, digest in digests.items())
    except (UserError, OSError, KeyError, TypeError, AttributeError):
        return False


def newest(run: Path) -> tuple[Path | None, list[Path]]:
    """The newest intact checkpoint, and the damaged ones passed over on the way to it."""
    damaged: list[Path] = []
    for folder in sorted((run / FOLDER).glob("step_*"), reverse=True):
        if intact(folder):
            return folder, damaged
        damaged.append(folder)
    return None, damaged


def load(folder: Path) -> Checkpoint:
    """Read a whole checkpoint onto the CPU."""
    info = read_json(folder / "checkpoint.json")
    return Checkpoint(
        update=info["update"],
        model=load_file(folder / "model.safetensors"),
        averages={decay: load_file(folder / f"ema_{decay}.safetensors") for decay in info["averages"]},
        state=torch.load(folder / "state.pt", weights_only=True, map_location="cpu"),
    )


def load_average(folder: Path, decay: str) -> dict[str, Tensor]:
    """The averaged weights of one decay.

    Raises:
        UserError: that decay was not kept; the kept ones are listed.
    """
    kept = read_json(folder / "checkpoint.json")["averages"]
    if decay not in kept:
        raise UserError(f"this run keeps no average {decay}", f"available: {', '.join(kept)}")
    return load_file(folder / f"ema_{decay}.safetensors")
