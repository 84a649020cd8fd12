"""Weights files of KL autoencoders: reading every published layout, writing our own, and saying what differs."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from neuromf.errors import UserError
from neuromf.files import atomic_path
from neuromf.models.kl_network import KLArchitecture

_WRAPPERS = ("unet_state_dict", "state_dict")  # NVIDIA wraps its autoencoder under the first, too


class KLWeights(NamedTuple):
    """State dict in float32, and the architecture if the file states one (ours do, published ones do not)."""

    tensors: dict[str, Tensor]
    architecture: KLArchitecture | None


def read_weights(path: str | Path) -> KLWeights:
    """Read a state dict, plain or under `unet_state_dict`, from `.safetensors` or `.pt`; no code is unpickled.

    Raises:
        UserError: absent, damaged, or not a state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"autoencoder weights {path} do not exist", "check the path")
    architecture = None
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                stated = (file.metadata() or {}).get("architecture")
                values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            architecture = KLArchitecture.from_dict(json.loads(stated)) if stated else None
        else:
            values = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} cannot be read as weights: {reason}", "download it again, or give another file"
        ) from error
    if isinstance(values, Mapping) and "scale_factor" in values:
        raise UserError(
            f"{path} is a rectified-flow U-Net, not an autoencoder",
            "networks start from it (training.init_from=FILE); encode with the autoencoder it was made for",
        )
    for wrapper in _WRAPPERS:
        if isinstance(values, Mapping) and isinstance(values.get(wrapper), Mapping):
            values = values[wrapper]
    if not isinstance(values, Mapping) or not values or not all(isinstance(v, Tensor) for v in values.values()):
        raise UserError(
            f"{path} holds no state dict (names with tensors), plain or under 'unet_state_dict'",
            "give the autoencoder's file, such as autoencoder_v1.pt",
        )
    return KLWeights({name: value.float() for name, value in values.items()}, architecture)


def write_weights(path: str | Path, tensors: Mapping[str, Tensor], architecture: KLArchitecture) -> None:
    """Write weights in float16 with their architecture; reading brings them back as float32."""
    half = {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(half, temporary, metadata={"architecture": json.dumps(architecture.to_dict())})
