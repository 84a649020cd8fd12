"""`neuromf train`: latents in, a run folder out; the same call again resumes."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from neuromf import __version__
from neuromf.config import TrainConfig, from_yaml
from neuromf.data.latents import LatentDataset, LatentFolderInfo, load_latent_folder_info
from neuromf.devices import torch_device
from neuromf.errors import UserError
from neuromf.files import atomic_path, read_json, remove_leftovers, write_json, write_text
from neuromf.models.autoencoder import load_autoencoder
from neuromf.models.unet import build_network, check_latent_size
from neuromf.reporting.figures import curves, montage
from neuromf.training import loop, memory
from neuromf.training.ema import window_warning
from neuromf.training.loop import MINIMUM_EPOCH, TrainResult

CONFIG_FILE, DATA_FILE, ENVIRONMENT_FILE, RESULT_FILE = "config.yaml", "data.json", "environment.json", "result.json"
SMALLER_PRESET = {"imf-xpred": "imf-xpred-small", "imf-upred": "imf-xpred-small", "rectflow": "imf-xpred-small"}
# These may change between two calls for one run: they do not touch what is learned.
FREE_TO_CHANGE = ("preset", "intervals", "guards", "training.workers")


class Silent:
    """A listener that says nothing."""

    def message(self, text: str) -> None:
        """Ignore."""

    def step(self, record: dict[str, Any]) -> None:
        """Ignore."""


class Plan(NamedTuple):
    """What a run would do and need, without doing it."""

    config: TrainConfig
    latent_shape: tuple[int, ...]
    subjects: int
    updates: int
    memory: memory.Memory
    device_memory: int
    device: str
    disk_bytes: int
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {
            "config": self.config.model_dump(mode="json"),
            "latent_shape": list(self.latent_shape),
            "subjects": self.subjects,
            "updates": self.updates,
            "parameters": self.memory.parameters,
            "memory_bytes": self.memory.total,
            "device_memory_bytes": self.device_memory,
            "device": self.device,
            "disk_bytes": self.disk_bytes,
            "warnings": self.warnings,
        }

    def lines(self) -> list[str]:
        """The plan in words."""
        gib = memory.GIB
        return [
            self.config.to_yaml().rstrip(),
            "",
            f"latents: {self.subjects} training subjects of {self.latent_shape}",
            f"network: {self.memory.parameters / 1e6:.2f} M parameters",
            f"updates: {self.updates:,}",
            f"memory: about {self.memory.total / gib:.1f} GiB (state {self.memory.state / gib:.1f}, activations "
            f"{self.memory.activations / gib:.1f}); {self.device} has {self.device_memory / gib:.1f} GiB",
            f"disk: about {self.disk_bytes / gib:.2f} GiB of checkpoints",
            *(f"warning: {text}" for text in self.warnings),
        ]


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
        listener: an object with `message(text)` and `step(record)`.

    Raises:
        UserError: no latents, a folder of another run, too little memory, a size the network cannot take.
        GuardError, Interrupted: see `training.loop.train`.
    """
    listener = listener or Silent()
    info = _latents(data)
    expected = plan(config, data, device=device, info=info)
    listener.message(f"data {data}, run {out}")
    listener.message("\n".join(expected.lines()[3:]))
    _refuse_too_large(expected)
    _claim(out, config, info)
    if (out / RESULT_FILE).exists() and read_json(out / RESULT_FILE)["updates"] == expected.updates:
        result = TrainResult(**read_json(out / RESULT_FILE))
        listener.message(f"already finished after {result.updates:,} updates; nothing to do")
        return result
    torch.use_deterministic_algorithms(deterministic)
    torch.manual_seed(config.training.seed)
    network = _network(config, info)
    write_json(out / ENVIRONMENT_FILE, environment(config, device))
    result = loop.train(
        config,
        out,
        network,
        training_set(data, config, info),
        _validation_set(data, info),
        _Recorder(listener, out, info, device),
        device=device,
        channel_weights=_channel_weights(config, info),
    )
    write_json(out / RESULT_FILE, result._asdict())
    return result


def plan(config: TrainConfig, data: Path, *, device: str = "auto", info: LatentFolderInfo | None = None) -> Plan:
    """What `train` would do: parameters, memory, disk, updates, warnings. Nothing is written.

    Raises:
        UserError: no latents there, or a size the network cannot take.
    """
    info = info or _latents(data)
    shape = tuple(info.dataset["latent_shape"])
    training = config.training
    if not config.network.pad:
        factor = info.dataset["autoencoder"].get("factor", 4)
        check_latent_size(shape[1:], len(config.network.channels), factor, config.network.patch)
    on_cuda = device != "cpu" and torch.cuda.is_available()
    half = training.precision == "bf16" or (training.precision == "auto" and on_cuda)
    with torch.device("meta"):
        ghost = _network(config, info)
    need = memory.estimate(ghost, shape, training.batch_size, len(config.ema.decays), half)
    subjects = len(info.splits["train"])
    batch = training.batch_size * training.accumulation
    updates = training.updates or (training.epochs or 1) * max(subjects // batch, MINIMUM_EPOCH)
    total, name = memory.available(device)
    # weights, the averages, and two moments of the optimiser, float32, for every kept checkpoint and one in the making
    disk = need.parameters * 4 * (3 + len(config.ema.decays)) * (config.intervals.keep_checkpoints + 1)
    warnings = [text for decay in config.ema.decays if (text := window_warning(decay, updates))]
    if training.precision == "bf16" and not on_cuda:
        warnings.append(
            "bf16 on a CPU: torch 2.13 gives wrong Conv3d weight gradients on grids of 2^3 cells; fp32 is safe"
        )
    return Plan(config, shape, subjects, updates, need, total, name, disk, warnings)


def training_set(data: Path, config: TrainConfig, info: LatentFolderInfo) -> LatentDataset:
    """The whitened training latents, with their flipped copies where `training.flip` asks for them."""
    copies = bool(info.dataset.get("flip_copies"))
    if config.training.flip is True and not copies:
        raise UserError(
            f"training.flip=true needs flipped copies and {data} has none",
            "run `neuromf encode` with --flip-copies (the autoencoder is not flip-equivariant), or leave it at auto",
        )
    return LatentDataset(data, "train", flipped=copies and config.training.flip is not False)


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
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
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


def _latents(data: Path) -> LatentFolderInfo:
    if not data.exists():
        raise UserError(
            f"there are no latents at {data}",
            f"make them with `neuromf encode SCANS --out {data}`, point --data at a folder that has them, or try "
            "`neuromf demo`, which needs no data",
        )
    return load_latent_folder_info(data)


def _network(config: TrainConfig, info: LatentFolderInfo) -> nn.Module:
    return build_network(latent_channels=int(info.dataset["latent_shape"][0]), **config.network.model_dump())


def _refuse_too_large(expected: Plan) -> None:
    if expected.memory.total <= expected.device_memory:
        return
    smaller = SMALLER_PRESET.get(expected.config.preset)
    raise UserError(
        f"this run needs about {expected.memory.total / memory.GIB:.1f} GiB and {expected.device} has "
        f"{expected.device_memory / memory.GIB:.1f} GiB",
        "lower training.batch_size (and raise training.accumulation)"
        + (f", or use --preset {smaller}" if smaller else ""),
    )


def _channel_weights(config: TrainConfig, info: LatentFolderInfo) -> Tensor | None:
    """(C,) factors: none, given, or 1 / sigma_c^2 of the raw latents scaled to a mean of one."""
    setting = config.objective.channel_weights
    if setting == "none":
        return None
    if setting == "precision":
        weights = torch.tensor(info.statistics.std, dtype=torch.float32) ** -2
        return weights / weights.mean()
    return torch.tensor(setting, dtype=torch.float32)


def _validation_set(data: Path, info: LatentFolderInfo) -> Dataset[Tensor]:
    return LatentDataset(data, "val") if info.splits["val"] else _Empty()


class _Empty(Dataset[Tensor]):
    def __len__(self) -> int:
        return 0


# --- the run folder -----------------------------------------------------------------------------------------


def _claim(out: Path, config: TrainConfig, info: LatentFolderInfo) -> None:
    """Write config.yaml and data.json, or check that they are this run's."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, a run needs a folder", "give another --out")
    description = describe_data(info)
    if (out / CONFIG_FILE).exists():
        _same_settings(out, config)
        before = read_json(out / DATA_FILE)
        if before["digest"] != description["digest"]:
            raise UserError(
                f"{out} was trained on other latents than {info.folder}",
                "give the latents it was started with, or another --out",
            )
        remove_leftovers(out)
    elif out.exists() and any(path.name not in {"neuromf-error.log"} for path in out.iterdir()):
        raise UserError(f"{out} is not empty and is not a run folder", "give another --out")
    write_json(out / DATA_FILE, description)
    write_text(out / CONFIG_FILE, config.to_yaml())


def describe_data(info: LatentFolderInfo) -> dict[str, Any]:
    """What of the latent folder travels with the run: statistics, split hash, preprocessing, autoencoder."""
    kept = {key: info.dataset.get(key) for key in ("latent_shape", "autoencoder", "preprocessing", "affine")}
    description = {
        **kept,
        "statistics": info.statistics.to_dict(),
        "split_hash": info.dataset["splits"]["hash"],
        "subjects": {name: len(subjects) for name, subjects in info.splits.items()},
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


class _Recorder:
    """The loop's listener: passes messages on, and writes `progress.png` and `samples/`."""

    def __init__(self, listener: Any, out: Path, info: LatentFolderInfo, device: str) -> None:
        self.listener, self.out, self.info = listener, out, info
        self.device = device
        self.message, self.step = listener.message, listener.step

    def epoch(self, summaries: list[dict[str, Any]]) -> None:
        """Redraw the curves; a long run redraws at most about 200 times."""
        if len(summaries) % max(1, len(summaries) // 20) == 0:
            self._curves(summaries)

    def _curves(self, summaries: list[dict[str, Any]]) -> None:
        def series(name: str) -> tuple[list[int], list[float]]:
            points = [(e["global_step"], e[name]) for e in summaries if e.get(name) is not None]
            return [x for x, _ in points], [y for _, y in points]

        panels = {
            "raw loss": {
                "r = t": series("raw_loss_fm_mean"),
                "r < t": series("raw_loss_mf_mean"),
                "validation": series("val_raw_loss"),
            },
            "cosine with v_c": {"V": series("cosine_sim_V_vc"), "tangent": series("cosine_sim_vtilde_vc")},
            "gradient norm": {"mean": series("grad_norm_mean")},
        }
        shown = {title: {name: xy for name, xy in lines.items() if xy[0]} for title, lines in panels.items()}
        curves(
            {title: lines for title, lines in shown.items() if lines},
            self.out / "progress.png",
            x_label="updates",
            log_y=("raw loss", "gradient norm"),
        )

    def samples(self, epoch: int, latents: Tensor) -> None:
        """Keep the whitened samples, a picture of their channels, and of what they decode to."""
        folder = self.out / "samples"
        with atomic_path(folder / "generated_samples" / f"epoch_{epoch:04d}.pt") as path:
            torch.save({"nfe_1": latents.clone()}, path)
        raw = self.info.statistics.unwhiten(latents)
        flat = (latents[0] / 6 + 0.5).clamp(0, 1).numpy()
        montage(
            list(flat), [f"channel {c}" for c in range(len(flat))], folder / f"epoch_{epoch:04d}/latent_channels.png"
        )
        autoencoder = self._autoencoder()
        if autoencoder is not None:
            volumes = autoencoder.decode(raw.to(autoencoder.device)).cpu().clamp(0, 1).numpy()
            titles = [f"sample {i}, 1 evaluation" for i in range(len(volumes))]
            montage(list(volumes), titles, folder / "decoded" / f"epoch_{epoch:04d}.png", columns=2)

    def _autoencoder(self) -> Any:
        """The autoencoder of these latents where it is at hand (foreign weights may lie elsewhere)."""
        recorded = self.info.dataset["autoencoder"]
        try:
            autoencoder = load_autoencoder(recorded["name"], device=torch_device(self.device))
        except UserError:
            return None
        return autoencoder if autoencoder.sha256 == recorded["sha256"] else None
