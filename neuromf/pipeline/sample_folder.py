"""The folder that `neuromf sample` writes: manifest.json, and latents/sample_000000.pt where latents are kept."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuromf.errors import UserError, did_you_mean
from neuromf.files import atomic_path, read_json, write_json
from neuromf.pipeline.sharing import value_at

MANIFEST = "manifest.json"
FORMAT, FORMAT_VERSION = "neuromf-samples", 1
IDENTITY = ("model.weights_sha256", "objective", "nfe", "solver", "seed", "latent_shape", "condition")
"""What of the manifest must agree for samples to share a folder."""


def identity(manifest: dict[str, Any]) -> dict[str, Any]:
    """`IDENTITY` of a manifest, by the last word of each key."""
    return {key.rpartition(".")[2]: value_at(manifest, key) for key in IDENTITY}


def sample_name(index: int) -> str:
    """What sample `index` is called, as a latent and as a volume."""
    return f"sample_{index:06d}"


def sample_path(folder: Path, index: int) -> Path:
    """Where the latent of sample `index` lies."""
    return folder / "latents" / f"{sample_name(index)}.pt"


def sample_indices(folder: Path) -> list[int]:
    """The samples whose latents are there, in order."""
    return sorted(int(path.stem.rpartition("_")[2]) for path in (folder / "latents").glob("sample_*.pt"))


def save_sample(path: Path, latent: Tensor, index: int) -> None:
    """Write one latent (C, I, J, K) atomically; the same content gives the same bytes."""
    # torch names the archive after the file it writes to; a buffer keeps the bytes independent of the name.
    buffer = io.BytesIO()
    torch.save({"z": latent.clone(), "metadata": {"index": index}}, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_sample(path: Path) -> tuple[int, Tensor]:
    """(index, latent (C, I, J, K)) of a file that `sample` wrote.

    Raises:
        UserError: damaged.
    """
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
        return int(content["metadata"]["index"]), content["z"]
    except Exception as error:  # a damaged file makes the unpickler raise nearly any type
        raise UserError(
            f"{path} is not a readable sample", "run the same `neuromf sample` again: it is redone"
        ) from error


def sound_sample(folder: Path, index: int, shape: tuple[int, ...]) -> Tensor | None:
    """The latent of sample `index` if it is there and whole, else None."""
    path = sample_path(folder, index)
    if not path.is_file():
        return None
    try:
        found, latent = load_sample(path)
    except UserError:
        return None
    return latent if (found, tuple(latent.shape)) == (index, shape) else None


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of samples.

    Raises:
        UserError: not a folder of samples.
    """
    if not (folder / MANIFEST).is_file():
        found = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        raise UserError(f"{folder} holds no samples ({MANIFEST} is missing)", did_you_mean(MANIFEST, found[:10]))
    return read_json(folder / MANIFEST)


def write_manifest(folder: Path, manifest: dict[str, Any], n: int) -> None:
    """Write the manifest of n samples; a folder that holds more of them already keeps their number."""
    write_json(folder / MANIFEST, {**manifest, "n": max(n, read_manifest(folder).get("n", 0))})
