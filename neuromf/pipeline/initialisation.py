"""What a run starts from: weights of ours or NVIDIA's (`training.init_from`), or a base to adapt (`adapters.base`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from neuromf import generator
from neuromf.config import TrainConfig
from neuromf.data.latents import LatentFolderInfo, LatentStatistics, class_names
from neuromf.errors import UserError, did_you_mean
from neuromf.models.mask_codec import PairLayout
from neuromf.models.pretrained import CODES, load_rectified_flow, rectified_flow_settings
from neuromf.models.state import state_sha256
from neuromf.models.warm_start import convert


def foreign_file(config: TrainConfig) -> Path | None:
    """The weights file of `training.init_from`, where it is a file and no run."""
    source = config.training.init_from
    return Path(source) if source and Path(source).suffix in (".pt", ".pth") else None


def foreign_statistics(file: Path, statistics: LatentStatistics) -> LatentStatistics:
    """How latents reach NVIDIA's network: raw, times its scale factor, so mean 0 and std 1 / scale_factor."""
    scale = load_rectified_flow(file).scale_factor
    channels = len(statistics.mean)
    return replace(statistics, mean=(0.0,) * channels, std=(1 / scale,) * channels)


def start_from(config: TrainConfig, description: dict[str, Any], network: nn.Module, listener: Any) -> None:
    """Load the weights of `training.init_from` into a fresh network, converted where the two differ.

    Args:
        config: resolved settings of the new run.
        description: of its data.
        network: of its settings; changed in place.
        listener: hears what was done.

    Raises:
        UserError: another prediction, another autoencoder, or a network that cannot be converted.
    """
    file = foreign_file(config)
    if file is not None:
        _start_from_nvidia(config, description, network, file)
        listener.message(f"starts from NVIDIA's rectified flow {file}")
        return
    source = str(config.training.init_from)
    base = generator.load(source, device="cpu")
    _same_prediction(base.config.objective.prediction, config, source)
    if base.data["autoencoder"]["sha256"] != description["autoencoder"]["sha256"]:
        raise UserError(
            f"{source} was trained on latents of another autoencoder",
            "encode the scans with the autoencoder of the run to start from",
        )
    settings, wanted = base.config.network.model_dump(), config.network.model_dump()
    if class_names(base.data) != class_names(description) and settings["classes"]:
        raise UserError(
            f"{source} knows the classes {', '.join(class_names(base.data))}, these latents "
            f"{', '.join(class_names(description)) or 'none'}",
            "encode with the same class column, or start from a run without classes",
        )
    settings["v_head_blocks"] = 0  # a sampling network has lost its second head; a fresh one takes its place
    network.load_state_dict(convert(base.network.state_dict(), settings, network, wanted))
    listener.message(f"starts from {source} (average {base.source.ema})")
    if base.data["statistics"] != description["statistics"]:
        listener.message("warning: its latents were whitened with other statistics: expect a rough start")


def _start_from_nvidia(config: TrainConfig, description: dict[str, Any], network: nn.Module, file: Path) -> None:
    _same_prediction("u", config, str(file))
    names = class_names(description) if config.network.classes else [config.training.init_contrast]
    unknown = [name for name in names if name not in CODES]
    if unknown:
        raise UserError(f"NVIDIA's network knows no contrast '{unknown[0]}'", did_you_mean(unknown[0], CODES))
    codes = [CODES[name] for name in names]
    flow = load_rectified_flow(file, codes if config.network.classes else codes[0])
    wanted = config.network.model_dump()
    network.load_state_dict(convert(flow.state, rectified_flow_settings(wanted), network, wanted))


def describe_base(base: generator.Generator) -> dict[str, Any]:
    """What adapters say of the base they belong to: its weights by hash, and where it lay."""
    place = base.source.path if base.source.path == "builtin" else str(Path(base.source.path).resolve())
    return {
        "sha256": state_sha256(base.network.state_dict()),
        "path": place,
        "ema": base.source.ema,
        "update": base.source.update,
        "parameters": sum(value.numel() for value in base.network.state_dict().values()),
    }


def adapted_statistics(config: TrainConfig, base: generator.Generator, info: LatentFolderInfo) -> LatentStatistics:
    """How pairs reach an adapted network: the image's channels on the base's scale, the mask's on their own.

    Raises:
        UserError: a base of another prediction, autoencoder or size, one with masks already, or latents without.
    """
    source, layout = str(config.adapters.base), PairLayout.of(info.dataset)
    if layout is None:
        raise UserError(f"{info.folder} holds images without masks", "make pairs with `neuromf lora --images --masks`")
    if base.pair is not None:
        raise UserError(
            f"{source} makes pairs already", "adapt the run it was made from, or train it further with init_from"
        )
    _same_prediction(base.config.objective.prediction, config, source)
    if base.config.network.model_dump() | {"v_head_blocks": 0} != config.network.model_dump():
        raise UserError(f"the network of {source} is another one than these settings", "leave out network.*=...")
    if base.data["autoencoder"]["sha256"] != info.dataset["autoencoder"]["sha256"]:
        raise UserError(
            f"{source} was trained on latents of another autoencoder than the pairs in {info.folder}",
            "give another --data: `neuromf lora` then encodes the pairs as the base's scans were",
        )
    if (wanted := list(base.latent_shape[1:])) != (found := list(info.dataset["latent_shape"])[1:]):
        raise UserError(
            f"the latents of {source} are {wanted}, those of the pairs in {info.folder} {found}",
            "give another --data: `neuromf lora` then encodes the pairs as the base's scans were",
        )
    known, own = base.statistics, info.statistics
    return replace(
        own,
        mean=known.mean + own.mean[layout.image_channels :],
        std=known.std + own.std[layout.image_channels :],
    )


def _same_prediction(found: str, config: TrainConfig, source: str) -> None:
    if found != config.objective.prediction:
        raise UserError(
            f"{source} predicts {found}, this run {config.objective.prediction}", f"set objective.prediction={found}"
        )
