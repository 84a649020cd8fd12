"""`neuromf lora`: a trained base and images with masks in; a run that makes both, and a small file of adapters out.

The run is one of `neuromf train`: the same loop, guards, resume and folder. Here is what is its own: how its settings
follow from the base's, and what is done with adapters afterwards.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from neuromf import config as settings
from neuromf import generator
from neuromf.config import ObjectiveConfig, TrainConfig, from_yaml
from neuromf.data.latents import DATASET_FILE, load_latent_folder_info
from neuromf.errors import UserError
from neuromf.files import read_json
from neuromf.launch import process_rank
from neuromf.models.mask_codec import PairLayout
from neuromf.pipeline import train as training
from neuromf.pipeline.pairs import PairReport, PairSource, encode_pairs
from neuromf.pipeline.plan import Plan
from neuromf.pipeline.run_folder import CONFIG_FILE, DATA_FILE
from neuromf.pipeline.sharing import wait_for
from neuromf.training import adapter_file, checkpoint
from neuromf.training.adapter_file import FILE, AdapterFile
from neuromf.training.loop import TrainResult

Progress = Callable[[str, int, int], None]


class LoraReport(NamedTuple):
    """How a run ended, and its file of adapters: bytes, also as a share of the base's."""

    result: TrainResult
    adapters: Path
    size_bytes: int
    share_of_base: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**self.result._asdict(), **{k: v for k, v in self._asdict().items() if k != "result"}}


def resolve(base: str, preset: str, overrides: Sequence[str] = (), config: Path | None = None) -> TrainConfig:
    """The settings of a run on a base: network, objective and times are the base's, unless the preset says otherwise.

    Args:
        base: a run, an exported generator, `builtin` or a hub id.
        preset, overrides, config: see `config.load`.

    Raises:
        UserError: no such base, one that cannot be adapted, or settings that are not valid.
    """
    folder = generator.find(base)
    known, data = from_yaml(folder / CONFIG_FILE), read_json(folder / DATA_FILE)
    if PairLayout.of(data) is not None:
        raise UserError(f"{base} makes pairs already", "adapt the run it was made from")
    if known.network.classes or known.network.guidance:
        raise UserError(f"{base} knows classes or guidance, and cannot be adapted yet", "take a base without them")
    below = {
        "network": {**known.network.model_dump(mode="json"), "v_head_blocks": 0},
        "objective": _objective(known.objective),
        "times": known.times.model_dump(mode="json"),
    }
    return settings.load(preset, [*overrides, f"adapters.base={json.dumps(base)}"], config, below=below)


def _objective(known: ObjectiveConfig) -> dict[str, Any]:
    """A base's objective for what is learned beside it: at its end, without a second head, by latents alone."""
    changed: dict[str, Any] = {"tangent": "boundary", "perceptual_weight": 0.0, "alpha_schedule": None}
    if known.name == "alphaflow":
        changed["name"] = "meanflow"
    return {**known.model_dump(mode="json"), **changed}


def fitted(config: TrainConfig, layout: PairLayout, base: Mapping[str, Any]) -> TrainConfig:
    """The settings with exponent and weight of each channel, now that it is known which there are.

    Args:
        config: resolved, with one lp, or one per channel of the image.
        layout: of the pairs.
        base: the base's data.json.

    Raises:
        UserError: lists of other lengths than the image has channels, or a weight beside learned ones.
    """
    objective, adapters = config.objective, config.adapters
    image, mask = layout.image_channels, layout.mask_channels
    lp = (adapters.image_lp,) * image if adapters.image_lp else _each(objective.lp, image, "objective.lp")
    lps = (*lp, *(adapters.mask_lp or math.fsum(lp) / image,) * mask)
    weights: Any = objective.channel_weights
    if weights != "learned":
        found = training.channel_weights_of(config, dict(base))
        own = (1.0,) * image if found is None else _each(tuple(found.tolist()), image, "objective.channel_weights")
        weights = (*own, *((adapters.mask_weight or math.fsum(own) / mask),) * mask)
        weights = "none" if set(weights) == {1.0} else weights
    elif adapters.mask_weight:
        raise UserError("adapters.mask_weight has no effect on learned weights", "set adapters.mask_weight=null")
    changed = {"lp": lps[0] if len(set(lps)) == 1 else lps, "channel_weights": weights}
    return config.model_copy(update={"objective": objective.model_copy(update=changed)})


def _each(value: float | tuple[float, ...], n: int, name: str) -> tuple[float, ...]:
    if not isinstance(value, tuple):
        return (value,) * n
    if len(value) != n:
        raise UserError(f"{name} has {len(value)} entries, and the base's latents have {n} channels", "give one each")
    return value


def prepare(
    config: TrainConfig,
    data: Path,
    source: PairSource | None = None,
    *,
    weights: Path | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> tuple[TrainConfig, PairReport | None]:
    """Encode the pairs where a source is given, and fit the settings to their channels.

    Args:
        config: see `resolve`.
        data: folder of the pairs.
        source: what to encode into it; None where it is there.
        weights: of the base's autoencoder, where it is not found by name.
        device: auto, cpu, cuda or mps.
        progress: callback (description, done, total).

    Raises:
        UserError: pairs that cannot be used, or a folder of other latents.
    """
    base, report = read_json(generator.find(str(config.adapters.base)) / DATA_FILE), None
    if source is not None and process_rank() == 0:
        autoencoder = generator.matching_autoencoder(base["autoencoder"], weights=weights, device=device)
        report = encode_pairs(source, data, autoencoder=autoencoder, base=base, progress=progress)
    elif source is not None:
        wait_for([data], _complete, "folders of pairs")
    if not data.exists():
        raise UserError(f"there are no pairs at {data}", "make them: --images FOLDER --masks FOLDER")
    layout = PairLayout.of(load_latent_folder_info(data).dataset)
    if layout is None:
        raise UserError(f"{data} holds images without masks", "give another --data, with --images and --masks")
    return fitted(config, layout, base), report


def _complete(data: Path) -> bool:
    return (data / DATASET_FILE).is_file() and bool(read_json(data / DATASET_FILE).get("complete"))


def plan(config: TrainConfig, data: Path, *, device: str = "auto") -> Plan:
    """What `lora` would do; see `train.plan`."""
    return training.plan(config, data, device=device)


def lora(
    config: TrainConfig,
    data: Path,
    out: Path,
    *,
    device: str = "auto",
    deterministic: bool = False,
    listener: Any = None,
) -> LoraReport:
    """Train adapters on pairs into a run folder, or resume it, and write their file.

    Args:
        config: see `prepare`.
        data: folder of pairs.
        out, device, deterministic, listener: see `train.train`.

    Raises:
        UserError, GuardError, Interrupted: see `train.train`.
    """
    result = training.train(config, data, out, device=device, deterministic=deterministic, listener=listener)
    path = out / FILE
    if process_rank() == 0:
        write_adapters(out)
    learned, base = _sizes(out)
    return LoraReport(result, path, path.stat().st_size if path.is_file() else 4 * learned, learned / base)


def write_adapters(run: Path) -> Path:
    """Write the file of adapters of a run: the selected average of its newest checkpoint."""
    content = _of_run(run)
    adapter_file.save_adapters(run / FILE, content)
    return run / FILE


def read_any(source: Path) -> AdapterFile:
    """Adapters from a run folder or from their file.

    Raises:
        UserError: neither, or a run without adapters.
    """
    return _of_run(source) if source.is_dir() else adapter_file.read_adapters(source)


def _of_run(run: Path) -> AdapterFile:
    folder = generator.find(run)
    config, data = from_yaml(folder / CONFIG_FILE), read_json(folder / DATA_FILE)
    if config.adapters.base is None:
        raise UserError(f"{run} has no adapters: it is a run of `neuromf train`", "give a run of `neuromf lora`")
    newest, _ = checkpoint.newest(folder)
    if newest is None:
        raise UserError(f"{run} has no checkpoint yet", "the same `neuromf lora` command trains further")
    name = config.ema.selected
    update = int(read_json(newest / "checkpoint.json")["update"])
    return AdapterFile(checkpoint.load_average(newest, name), config, data, name, update)


def _sizes(run: Path) -> tuple[int, int]:
    """Numbers of what is learned and of the base's weights."""
    content = _of_run(run)
    learned = sum(value.numel() for value in content.weights.values())
    return learned, int(content.data["base"]["parameters"])


def info(source: Path) -> dict[str, Any]:
    """What adapters are: their base, sizes, settings, and how masks are stored.

    Args:
        source: a run of `lora`, or its file of adapters.

    Raises:
        UserError: no adapters there.
    """
    content = read_any(source)
    base, adapters = content.data["base"], content.config.adapters
    layout = PairLayout.from_dict(content.data["pair"])
    learned = sum(value.numel() for value in content.weights.values())
    return {
        "base": base["path"],
        "base_sha256": base["sha256"],
        "base_parameters": base["parameters"],
        "parameters": learned,
        "share_of_base": learned / base["parameters"],
        "rank": adapters.rank,
        "lora_alpha": adapters.lora_alpha,
        "targets": adapters.targets,
        "image_channels": layout.image_channels,
        "mask_channels": layout.mask_channels,
        "mask": layout.strategy,
        "mask_threshold": layout.threshold,
        "pairs": content.data["subjects"],
        "ema": content.ema,
        "update": content.update,
        "size_bytes": source.stat().st_size if source.is_file() else 4 * learned,
    }


def merge(source: Path, out: Path, base: str | None = None) -> Path:
    """Write base and adapters as one generator, which needs neither.

    Args:
        source: a run of `lora`, or its file of adapters.
        out: a new folder.
        base: where the base lies, if it was moved.

    Raises:
        UserError: no adapters there, the folder holds something, or the base is not there or another one.
    """
    read_any(source)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already", "give another --out")
    return generator.load(source, base=base, device="cpu").save_pretrained(out)
