"""Weights on disk: where a run or an exported generator lies, and what it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import Tensor

from neuromf.config import TrainConfig
from neuromf.errors import UserError
from neuromf.files import read_json, sha256_file
from neuromf.training import checkpoint

WEIGHTS_FILE, CONFIG_FILE, DATA_FILE = "generator.safetensors", "config.yaml", "data.json"
BUILTIN = Path(__file__).parent.parent / "assets" / "generator"


class Source(NamedTuple):
    """Where a generator came from: shown in manifests and sidecars."""

    path: str
    weights_sha256: str
    update: int | None
    ema: str


def find(source: str | Path) -> Path:
    """The folder of a run or an exported generator: from a path, `"builtin"` or a hub id.

    Raises:
        UserError: nothing there, or something else.
    """
    folder = _folder(str(source))
    if not (folder / CONFIG_FILE).is_file() or not (folder / DATA_FILE).is_file():
        raise UserError(f"{folder} is neither a run nor an exported generator", "runs are made by `neuromf train`")
    return folder


def _folder(source: str) -> Path:
    if source == "builtin":
        if not BUILTIN.is_dir():
            raise UserError("this build ships no generator", "train one: `neuromf demo` needs no data")
        return BUILTIN
    path = Path(source)
    if path.exists() or source.count("/") != 1 or source.startswith((".", "/", "runs/")):
        if not path.is_dir():
            raise UserError(f"there is no run at {path}", "give a run folder, `builtin`, or a hub id owner/name")
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=[WEIGHTS_FILE, CONFIG_FILE, DATA_FILE]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"'{source}' is no folder here, and could not be fetched from the hub: {str(error).splitlines()[0]}",
            "check the path or the id; without internet copy the folder here and give its path",
        ) from error


def read_weights(
    folder: Path, config: TrainConfig, data: dict[str, Any], ema: str | None
) -> tuple[dict[str, Tensor], Source]:
    """The averaged weights of a run's newest checkpoint, or those of an export.

    Raises:
        UserError: no checkpoint yet, or no such average.
    """
    exported = folder / WEIGHTS_FILE
    if exported.is_file():
        held = str(data.get("ema"))
        if ema is not None and ema != held:
            raise UserError(f"{folder} holds the average {held} alone, not {ema}", "leave --ema out")
        return load_file(exported), Source(str(folder), sha256_file(exported), data.get("update"), held)
    newest, _ = checkpoint.newest(folder)
    if newest is None:
        raise UserError(f"{folder} has no checkpoint yet", "train further: the same `neuromf train` command resumes")
    name = ema or config.ema.selected
    weights = checkpoint.load_average(newest, name)
    file = newest / f"ema_{name}.safetensors"
    update = int(read_json(newest / "checkpoint.json")["update"])
    return weights, Source(str(folder), sha256_file(file), update, name)


def read_best(folder: Path, ema: str | None) -> tuple[dict[str, Tensor], Source]:
    """The averaged weights of a run that had the lowest validation loss.

    Raises:
        UserError: none were kept, or of another average.
    """
    weights, kept = checkpoint.load_best(folder)
    if ema not in (None, kept.ema):
        raise UserError(
            f"the best weights of {folder} are those of the average {kept.ema}, not {ema}",
            "leave --ema out, or take the newest checkpoint",
        )
    file = folder / checkpoint.FOLDER / checkpoint.BEST
    return weights, Source(str(folder), sha256_file(file), kept.update, kept.ema)


def average_name(ema: str | float) -> str:
    """How checkpoints call an average: 0.9950 and "0.995" are `0.995`, a half-life is `500kimg`."""
    try:
        return f"{float(ema):g}"
    except ValueError:
        return str(ema)
