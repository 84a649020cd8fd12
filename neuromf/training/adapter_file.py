"""Adapters of a run: which there are, and the one small file they travel in.

`adapters.safetensors` holds what was learned beside a frozen base (an average of it), and in its header the run's
settings and data description, and which base it belongs to: by the SHA-256 of that base's weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from neuromf.config import TrainConfig, from_values
from neuromf.errors import UserError
from neuromf.files import atomic_path
from neuromf.models.adapters import Adapters
from neuromf.models.mask_codec import PairLayout
from neuromf.models.state import state_sha256

FILE = "adapters.safetensors"
FORMAT, FORMAT_VERSION = "neuromf-adapters", 1
_HEADER = "neuromf"


class AdapterFile(NamedTuple):
    """Learned weights with all that is needed to use them beside their base.

    ema, update: which average they are, after how many updates.
    """

    weights: dict[str, Tensor]
    config: TrainConfig
    data: dict[str, Any]
    ema: str
    update: int | None


def adapters_of(config: TrainConfig, data: Mapping[str, Any]) -> Adapters | None:
    """What a run adds to its base; None where it has none.

    Args:
        config: of the run.
        data: its data.json.

    Raises:
        UserError: adapters are asked for, and the latents are no pairs.
    """
    if config.adapters.base is None:
        return None
    layout = PairLayout.of(data)
    if layout is None:
        raise UserError(
            "adapters learn pairs of image and mask, and these latents are of images alone",
            "make pairs and train with `neuromf lora --base RUN --images FOLDER --masks FOLDER`",
        )
    settings = config.adapters
    return Adapters(layout.mask_channels, settings.rank, settings.lora_alpha, settings.kinds)


def save_adapters(path: Path, adapters: AdapterFile) -> None:
    """Write the file atomically."""
    data = {key: value for key, value in adapters.data.items() if key != "latents"}
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": adapters.config.model_dump(mode="json"),
        "data": data,
        "ema": adapters.ema,
        "update": adapters.update,
        "sha256": state_sha256(adapters.weights),
    }
    weights = {name: value.detach().cpu().contiguous() for name, value in adapters.weights.items()}
    with atomic_path(path) as temporary:
        save_file(weights, temporary, {_HEADER: json.dumps(header, allow_nan=False)})


def read_adapters(path: Path) -> AdapterFile:
    """Read what `save_adapters` wrote.

    Raises:
        UserError: no such file, another file, or a damaged one.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}", f"`neuromf lora` writes {FILE} into its run folder")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
        weights = load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(f"{path} is damaged: {error}", "copy it again, or take the run it is from") from error
    if (header.get("format"), header.get("format_version")) != (FORMAT, FORMAT_VERSION):
        raise UserError(f"{path} holds no adapters of this program", f"give a run of `neuromf lora`, or its {FILE}")
    if state_sha256(weights) != header["sha256"]:
        raise UserError(f"{path} is damaged: its weights are not those it was written with", "copy it again")
    config = from_values(header["config"], str(path))
    return AdapterFile(weights, config, header["data"], header["ema"], header["update"])
