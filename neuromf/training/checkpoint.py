"""Checkpoints: whole or absent, checksummed, rotated.

`checkpoints/step_XXXXXXXX/` holds `model.safetensors`, one `ema_<decay>.safetensors` per average, `state.pt`
(optimiser, guards, the unfinished epoch) and `checkpoint.json` (update count, SHA-256 of the others and of the
autoencoder whose latents the weights belong to). The folder is made under another name and renamed, so a killed run
leaves the one before.

`checkpoints/best.safetensors` is the selected average where its validation loss was the lowest so far: one file with
its update, loss and digest in its header, replaced by one rename, so that no marker can point at the wrong thing. It
holds that average alone, to sample from; nothing is resumed from it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from neuromf.errors import UserError
from neuromf.files import atomic_path, discard_folder, read_json, remove_leftovers, sha256_file, write_json
from neuromf.models.state import state_sha256

FOLDER, BEST = "checkpoints", "best.safetensors"
FORMAT = 1


class Checkpoint(NamedTuple):
    """What a run needs to go on.

    batch: samples per update, over all processes.
    healthy: False while the raw loss is far above where it began.
    averages: a decay such as "0.9995" -> weights.
    """

    update: int
    batch: int
    healthy: bool
    model: dict[str, Tensor]
    averages: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


class Best(NamedTuple):
    """Which weights had the lowest validation loss: after how many updates, and which average they are."""

    update: int
    ema: str
    val_raw_loss: float


def folder_of(run: Path, update: int) -> Path:
    """Where the checkpoint after `update` updates lies."""
    return run / FOLDER / f"step_{update:08d}"


def save(run: Path, checkpoint: Checkpoint, keep: int, keep_every: int | None = None) -> Path:
    """Write a checkpoint and drop the older ones beyond `keep`.

    Args:
        run: the run folder.
        checkpoint: what to write.
        keep: how many of the newest stay.
        keep_every: those after a multiple of this many updates stay, too.

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
            {
                "format": FORMAT,
                "update": checkpoint.update,
                "batch": checkpoint.batch,
                "healthy": checkpoint.healthy,
                "averages": list(checkpoint.averages),
                "sha256": digests,
                "autoencoder_sha256": _autoencoder_of(run),
            },
        )
    rotate(target, keep, keep_every)
    return target


def _autoencoder_of(run: Path) -> str | None:
    """That of the run's data.json; None where no autoencoder made what it learns from."""
    try:
        return read_json(run / "data.json")["autoencoder"]["sha256"]
    except (UserError, KeyError, TypeError):
        return None


def rotate(newest: Path, keep: int, keep_every: int | None) -> None:
    """Drop what is neither among the newest, nor to stay for good, nor the last from before a divergence."""
    # Later ones can only be damaged ones that a resume passed over: they must not crowd out the good.
    folders = [folder for folder in sorted(newest.parent.glob("step_*")) if folder.name <= newest.name]
    good = last_healthy(newest.parent.parent)
    for old in folders[:-keep]:
        if old != good and (keep_every is None or int(old.name.removeprefix("step_")) % keep_every):
            discard_folder(old)


def last_healthy(run: Path) -> Path | None:
    """The newest checkpoint that was written while the run did not diverge."""
    for folder in sorted((run / FOLDER).glob("step_*"), reverse=True):
        try:
            if read_json(folder / "checkpoint.json")["healthy"]:
                return folder
        except (UserError, KeyError):
            continue
    return None


def last_good(run: Path) -> str:
    """Where the weights from before a divergence lie, in words."""
    folder = last_healthy(run)
    return "no checkpoint had been written before" if folder is None else f"the last good checkpoint is {folder}"


def _save_weights(path: Path, weights: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    try:
        save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, path, metadata)
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
        batch=info["batch"],
        healthy=info["healthy"],
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


# --- the best --------------------------------------------------------------------------------------------------------


def keep_best(run: Path, update: int, ema: str, val_raw_loss: float | None, weights: Mapping[str, Tensor]) -> bool:
    """Keep averaged weights if their validation loss is lower than that of the ones kept so far.

    Args:
        run: the run folder.
        update: how many updates they had.
        ema: which average they are.
        val_raw_loss: None, where nothing was validated, keeps nothing.
        weights: of the average.

    Returns:
        Whether it is.
    """
    kept = best(run)
    if val_raw_loss is None or (kept is not None and kept.val_raw_loss <= val_raw_loss):
        return False
    header = {"update": str(update), "ema": ema, "val_raw_loss": repr(val_raw_loss), "sha256": state_sha256(weights)}
    with atomic_path(run / FOLDER / BEST) as path:
        _save_weights(path, weights, header)
    return True


def best(run: Path) -> Best | None:
    """What the run's best weights are; None where it has none, or a file that cannot be read."""
    try:
        return _best_of(_header(run))
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def load_best(run: Path) -> tuple[dict[str, Tensor], Best]:
    """The averaged weights whose validation loss was the lowest.

    Raises:
        UserError: the run has validated none yet, or the file is damaged.
    """
    path = run / FOLDER / BEST
    if not path.is_file():
        raise UserError(
            f"{run} has no best weights: they are kept where the run validates",
            "take the newest checkpoint, or train with validation latents",
        )
    try:
        weights, header = load_file(path), _header(run)
        if state_sha256(weights) == header["sha256"]:
            return weights, _best_of(header)
    except (SafetensorError, KeyError, ValueError):
        pass
    raise UserError(f"{path} is damaged", "take the newest checkpoint; the next better validation replaces the file")


def _header(run: Path) -> dict[str, str]:
    with safe_open(run / FOLDER / BEST, framework="pt") as file:
        return dict(file.metadata() or {})


def _best_of(header: Mapping[str, str]) -> Best:
    return Best(int(header["update"]), header["ema"], float(header["val_raw_loss"]))
