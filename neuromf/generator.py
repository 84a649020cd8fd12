"""A trained model as one object: `load(...)`, then `.sample(n, nfe=1)`.

It can be read from a run folder (weights of the selected average), from a folder that `save_pretrained` wrote,
from the hub, or from the wheel (`"builtin"`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from neuromf.config import TrainConfig, from_yaml
from neuromf.data.latents import LatentStatistics
from neuromf.devices import torch_device
from neuromf.errors import UserError
from neuromf.files import atomic_path, read_json, sha256_file, write_json, write_text
from neuromf.losses.path import average_velocity, data_estimate
from neuromf.models.autoencoder import Autoencoder, load_autoencoder
from neuromf.models.unet import build_network
from neuromf.sampling.noise import noise_batch
from neuromf.sampling.solvers import SOLVERS, time_grid
from neuromf.training import checkpoint

Solver = Literal["auto", "meanflow", "euler", "heun"]
WEIGHTS_FILE, CONFIG_FILE, DATA_FILE = "generator.safetensors", "config.yaml", "data.json"
BUILTIN = Path(__file__).parent / "assets" / "generator"


class Source(NamedTuple):
    """Where a generator came from: shown in manifests and sidecars."""

    path: str
    weights_sha256: str
    update: int | None
    ema: str


class Generator:
    """A network with everything needed to turn noise into volumes.

    Args:
        network: maps (z, r, t) to u or x_hat; put in evaluation mode.
        config: the run's settings.
        data: the run's data.json: statistics, latent shape, autoencoder, preprocessing, affine.
        source: provenance.
        device: where the network runs.
    """

    def __init__(
        self, network: nn.Module, config: TrainConfig, data: dict[str, Any], source: Source, device: torch.device
    ) -> None:
        self.network = network.to(device).eval().requires_grad_(False)
        self.config, self.data, self.source, self.device = config, data, source, device
        self.statistics = LatentStatistics.from_dict(data["statistics"])
        self.latent_shape: tuple[int, ...] = tuple(data["latent_shape"])
        self._autoencoder: Autoencoder | None = None

    def u(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        """Average velocity u(z_t, r, t), (B, C, I, J, K) whitened."""
        objective = self.config.objective
        return average_velocity(self.network(z, r, t), z, t, objective.prediction, objective.t_min)

    def x_hat(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        """The network's data estimate at (z_t, r, t), (B, C, I, J, K) whitened."""
        return data_estimate(self.network(z, r, t), z, t, self.config.objective.prediction)

    def solver(self, name: Solver = "auto") -> str:
        """The solver a name means for this model: flow-matching models take Euler steps, others MeanFlow's jump.

        Raises:
            UserError: unknown, or MeanFlow's jump asked of a model that never saw r < t.
        """
        flow = self.config.objective.name == "rectflow"
        if name == "auto":
            return "euler" if flow else "meanflow"
        if name not in SOLVERS:
            raise UserError(f"no solver '{name}'", f"available: auto, {', '.join(SOLVERS)}")
        if flow and name == "meanflow":
            raise UserError(
                "this model was trained with rectflow: it knows no average velocity", "use --solver euler or heun"
            )
        return name

    @torch.inference_mode()
    def sample_latents(self, indices: Sequence[int], *, nfe: int = 1, seed: int = 0, solver: Solver = "auto") -> Tensor:
        """Latents of the samples with these indices, evaluated as one batch.

        Args:
            indices: sample i's noise depends on (seed, i) alone.
            nfe: network evaluations (intervals; Heun costs two each but the last).
            seed: of the noise.
            solver: see `solver`.

        Returns:
            (B, C, I, J, K) float32 on the CPU, unwhitened.
        """
        noise = noise_batch(seed, indices, self.latent_shape).to(self.device)
        data = self.x_hat if self.config.objective.prediction == "x" else None
        whitened = SOLVERS[self.solver(solver)](self.u, noise, time_grid(nfe), data)
        return self.statistics.unwhiten(whitened.float()).cpu()

    @property
    def autoencoder(self) -> Autoencoder:
        """The autoencoder these latents belong to, by hash."""
        if self._autoencoder is None:
            self._autoencoder = matching_autoencoder(self.data["autoencoder"], device=str(self.device))
        return self._autoencoder

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, I, J, K) latents -> (B, 1, 4I, 4J, 4K) volumes, float32, on the CPU."""
        return self.autoencoder.decode(latents.to(self.device)).float().cpu()

    def sample(self, n: int, *, nfe: int = 1, seed: int = 0, solver: Solver = "auto", batch_size: int = 8) -> Tensor:
        """n volumes (n, 1, I, J, K), float32, intensities as trained (background 0, 99.5th percentile 1).

        Example:
            >>> neuromf.load("runs/cpu-small").sample(2).shape  # doctest: +SKIP
            torch.Size([2, 1, 64, 64, 64])
        """
        blocks = [range(start, min(start + batch_size, n)) for start in range(0, n, batch_size)]
        return torch.cat([self.decode(self.sample_latents(b, nfe=nfe, seed=seed, solver=solver)) for b in blocks])

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the generator alone (weights of the chosen average, settings, statistics), for `load`."""
        folder = Path(folder)
        with atomic_path(folder / WEIGHTS_FILE) as path:
            save_file({k: v.detach().cpu().contiguous() for k, v in self.network.state_dict().items()}, path)
        write_text(folder / CONFIG_FILE, self.config.to_yaml())
        local = {key: value for key, value in self.data.items() if key != "latents"}
        write_json(folder / DATA_FILE, {**local, "ema": self.source.ema, "update": self.source.update})
        return folder


def load(source: str | Path, *, ema: str | float | None = None, device: str = "auto") -> Generator:
    """A generator from a run folder, an exported folder, `"builtin"`, or a hub id `owner/name`.

    Args:
        source: where it lies.
        ema: decay of the average to use; the run's `ema.select` when None. Exported folders hold one.
        device: auto, cpu, cuda or mps.

    Raises:
        UserError: nothing there, no checkpoint yet, or no such average.
    """
    folder = _folder(str(source))
    if not (folder / CONFIG_FILE).is_file() or not (folder / DATA_FILE).is_file():
        raise UserError(f"{folder} is neither a run nor an exported generator", "runs are made by `neuromf train`")
    config, data = from_yaml(folder / CONFIG_FILE), read_json(folder / DATA_FILE)
    network = build_network(latent_channels=int(data["latent_shape"][0]), **config.network.model_dump())
    weights, origin = _weights(folder, config, data, ema)
    network.load_state_dict(weights)
    return Generator(network, config, data, origin, torch_device(device))


def matching_autoencoder(recorded: dict[str, Any], *, weights: Path | None = None, device: str = "auto") -> Autoencoder:
    """The autoencoder that latents were made with.

    Args:
        recorded: {name, sha256} as latents and runs store it.
        weights: file of a foreign autoencoder, where it is not found by name.

    Raises:
        UserError: it cannot be loaded, or its weights have another hash.
    """
    autoencoder = load_autoencoder(recorded["name"], device=torch_device(device), weights=weights)
    if autoencoder.sha256 != recorded["sha256"]:
        raise UserError(
            f"these latents were made by the autoencoder '{recorded['name']}' ({recorded['sha256'][:12]}...), "
            f"the one at hand has {autoencoder.sha256[:12]}...",
            "decode with the weights they were made with (--weights FILE): another decoder gives meaningless volumes",
        )
    return autoencoder


def _folder(source: str) -> Path:
    if source == "builtin":
        if not BUILTIN.is_dir():
            raise UserError("this build ships no generator", "train one: `neuromf demo` needs no data")
        return BUILTIN
    path = Path(source)
    if path.exists() or source.count("/") != 1 or source.startswith((".", "/")):
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


def _weights(
    folder: Path, config: TrainConfig, data: dict[str, Any], ema: str | float | None
) -> tuple[dict[str, Tensor], Source]:
    exported = folder / WEIGHTS_FILE
    if exported.is_file():
        held = str(data.get("ema"))
        if ema is not None and f"{float(ema):g}" != held:
            raise UserError(f"{folder} holds the average {held} alone, not {ema}", "leave --ema out")
        return load_file(exported), Source(str(folder), sha256_file(exported), data.get("update"), held)
    newest, _ = checkpoint.newest(folder)
    if newest is None:
        raise UserError(f"{folder} has no checkpoint yet", "train further: the same `neuromf train` command resumes")
    decay = f"{config.ema.select if ema is None else float(ema):g}"
    weights = checkpoint.load_average(newest, decay)
    file = newest / f"ema_{decay}.safetensors"
    update = int(read_json(newest / "checkpoint.json")["update"])
    return weights, Source(str(folder), sha256_file(file), update, decay)
