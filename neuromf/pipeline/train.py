"""`neuromf train`: latents in, a run folder out; the same call again resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from neuromf import generator
from neuromf.config import TrainConfig
from neuromf.data.latents import (
    LatentDataset,
    LatentFolderInfo,
    LatentStatistics,
    class_names,
    copies_of,
    load_latent_folder_info,
)
from neuromf.errors import UserError
from neuromf.files import read_json, write_json
from neuromf.launch import process_rank
from neuromf.models.adapters import load_base
from neuromf.models.autoencoder import KLAutoencoder
from neuromf.models.networks import build_network
from neuromf.pipeline.initialisation import (
    adapted_statistics,
    describe_base,
    foreign_file,
    foreign_statistics,
    start_from,
)
from neuromf.pipeline.plan import Plan, plan_run, refuse_too_large
from neuromf.pipeline.recorder import Recorder, Silent
from neuromf.pipeline.run_folder import (
    ENVIRONMENT_FILE,
    RESULT_FILE,
    check_folder,
    claim,
    describe_data,
    environment,
)
from neuromf.training import checkpoint, loop
from neuromf.training.adapter_file import adapters_of
from neuromf.training.loop import TrainResult
from neuromf.training.perceptual import DecodedCrops
from neuromf.training.processes import make_accelerator
from neuromf.training.trackers import check_installed


class TrainingData(NamedTuple):
    """What a run learns from: its description (data.json) and the whitened sets; and the base it adapts, if any."""

    description: dict[str, Any]
    training_set: Dataset[Tensor]
    validation_set: Dataset[Tensor]
    base: generator.Generator | None = None


def train(
    config: TrainConfig,
    data: Path,
    out: Path,
    *,
    device: str = "auto",
    deterministic: bool = False,
    listener: Any = None,
) -> TrainResult:
    """Train on a folder of latents into a run folder, or resume what the folder holds.

    Args:
        config: resolved settings.
        data: written by `neuromf encode`.
        out: the run folder; made if absent.
        device: auto, cpu, cuda or mps.
        deterministic: only deterministic kernels (slower on GPUs).
        listener: an object with `message(text)` and `step(record)`; its `epoch(summaries)`, if it has one, hears of
            every epoch's end.

    Raises:
        UserError: no latents, a folder of another run, too little memory, a size the network cannot take, or a
            tracker that is not installed or does not start.
        GuardError, Interrupted: see `training.loop.train`.
    """
    listener = _heard(listener)
    listener.message(f"data {data}, run {out}")
    expected = plan(config, data, device=device)
    _announce(expected, listener)
    sets = training_data(config, data)
    return train_on(config, sets, out, expected=expected, device=device, deterministic=deterministic, listener=listener)


def training_data(config: TrainConfig, data: Path) -> TrainingData:
    """What a run learns from, as a folder of latents holds it.

    Raises:
        UserError: no latents there, or no copies where they are asked for.
    """
    info = _latents(data)
    described = describe_data(info, copies=_copies(config, info))
    statistics, base = info.statistics, None
    if (file := foreign_file(config)) is not None:  # its network is used to another scale than these latents' own
        statistics = foreign_statistics(file, info.statistics)
        described["statistics"] = statistics.to_dict()
    if config.adapters.base is not None:
        base = generator.load(config.adapters.base, device="cpu")
        statistics = adapted_statistics(config, base, info)
        described |= {"statistics": statistics.to_dict(), "base": describe_base(base)}
    return TrainingData(
        described, training_set(data, config, info, statistics), _validation_set(data, info, statistics), base
    )


def train_on(
    config: TrainConfig,
    data: TrainingData,
    out: Path,
    *,
    expected: Plan | None = None,
    device: str = "auto",
    deterministic: bool = False,
    listener: Any = None,
) -> TrainResult:
    """Train on sets that are at hand; `expected` is their plan if it was made already, the rest is as in `train`."""
    listener = _heard(listener)
    accelerator = make_accelerator(device, config.training.precision)
    check_folder(out, config, data.description)
    check_installed(config.tracking.to)
    accelerator.wait_for_everyone()  # all have looked before the main process claims it
    latents = len(data.training_set)  # type: ignore[arg-type]
    updates = (expected or plan_run(config, data.description, latents=latents, device=device)).updates
    if (out / RESULT_FILE).exists() and read_json(out / RESULT_FILE)["updates"] == updates:
        result = TrainResult(**read_json(out / RESULT_FILE))
        listener.message(f"already finished after {result.updates:,} updates; nothing to do")
        return result
    torch.use_deterministic_algorithms(deterministic)
    torch.manual_seed(config.training.seed)
    classes = len(class_names(data.description)) if config.network.classes else 0
    network = build_network(
        config.network.model_dump(),
        data.description["latent_shape"],
        classes=classes,
        adapters=adapters_of(config, data.description),
    )
    if data.base is not None:
        load_base(network, data.base.network.state_dict())
    if config.training.init_from and checkpoint.newest(out)[0] is None:
        start_from(config, data.description, network, listener)
    perceptual = perceptual_of(config, data.description, device)
    if accelerator.is_main_process:  # what can be refused has been
        claim(out, config, data.description)
        write_json(out / ENVIRONMENT_FILE, environment(config, device))
    accelerator.wait_for_everyone()
    recorder = Recorder(listener, out, config, data.description, device) if accelerator.is_main_process else Silent()
    with recorder:
        result = loop.train(
            config,
            out,
            network,
            data.training_set,
            data.validation_set,
            recorder,
            accelerator=accelerator,
            channel_weights=channel_weights_of(config, data.description),
            classes=classes,
            perceptual=perceptual,
        )
    if accelerator.is_main_process:
        write_json(out / RESULT_FILE, result._asdict())
    return result


def plan(config: TrainConfig, data: Path, *, device: str = "auto") -> Plan:
    """What `train` would do: parameters, memory, disk, updates, warnings. Nothing is written.

    Raises:
        UserError: no latents there, or a size the network cannot take.
    """
    info = _latents(data)
    return plan_run(
        config, describe_data(info, copies=_copies(config, info)), latents=_count(config, info), device=device
    )


def training_set(
    data: Path, config: TrainConfig, info: LatentFolderInfo, statistics: LatentStatistics | None = None
) -> LatentDataset:
    """The whitened training latents, with their copies where `training.augmentation` asks for them."""
    copies = _copies(config, info)
    if config.training.augmentation is True and not copies:
        raise UserError(
            f"training.augmentation=true needs copies of the training scans and {data} has none",
            "run its `neuromf encode` again with --copies N or --flip-copies, or leave it at auto",
        )
    return LatentDataset(data, "train", copies=copies > 0, statistics=statistics)


def _copies(config: TrainConfig, info: LatentFolderInfo) -> int:
    """How many copies of each training scan are trained on."""
    return 0 if config.training.augmentation is False else len(copies_of(info.dataset))


def _count(config: TrainConfig, info: LatentFolderInfo) -> int:
    """How many latents are trained on: copies make an epoch longer, each is seen once in it."""
    return len(info.splits["train"]) * (1 + _copies(config, info))


def _heard(listener: Any) -> Any:
    """The listener, in the main process of those that a launcher started."""
    return Silent() if listener is None or process_rank() else listener


def _announce(expected: Plan, listener: Any) -> None:
    """Say what the run needs, and refuse what cannot fit."""
    listener.message("\n".join(expected.brief()))
    refuse_too_large(expected)


def _latents(data: Path) -> LatentFolderInfo:
    if not data.exists():
        raise UserError(
            f"there are no latents at {data}",
            f"make them with `neuromf encode SCANS --out {data}`, point --data at a folder that has them, or try "
            "`neuromf demo`, which needs no data",
        )
    return load_latent_folder_info(data)


def channel_weights_of(config: TrainConfig, description: dict[str, Any]) -> Tensor | None:
    """(C,) factors: none, given, or a power of the raw latents' sigma_c scaled to a mean of one."""
    setting = config.objective.channel_weights
    if setting in ("none", "learned"):
        return None
    if setting in ("precision", "variance"):
        sigma = torch.tensor(LatentStatistics.from_dict(description["statistics"]).std, dtype=torch.float32)
        weights = sigma**2 if setting == "variance" else sigma**-2
        return weights / weights.mean()
    return torch.tensor(setting, dtype=torch.float32)


def perceptual_of(config: TrainConfig, description: dict[str, Any], device: str) -> DecodedCrops | None:
    """The distance of decoded crops, where the objective gives it a weight."""
    if not config.objective.perceptual_weight:
        return None
    autoencoder = generator.matching_autoencoder(description["autoencoder"], device=device)
    if not isinstance(autoencoder, KLAutoencoder):
        raise UserError(
            f"objective.perceptual_weight needs an encoder with features, and '{autoencoder.name}' has none",
            "encode with the builtin or the maisi autoencoder, or set objective.perceptual_weight=0",
        )
    statistics = LatentStatistics.from_dict(description["statistics"])
    return DecodedCrops(autoencoder, statistics.unwhiten, config.objective.perceptual_crop)


def _validation_set(data: Path, info: LatentFolderInfo, statistics: LatentStatistics) -> Dataset[Tensor]:
    return LatentDataset(data, "val", statistics=statistics) if info.splits["val"] else _Empty()


class _Empty(Dataset[Tensor]):
    def __len__(self) -> int:
        return 0
