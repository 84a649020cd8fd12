"""A trained model as one object: `load(...)`, then `.sample(n, nfe=1)`.

It can be read from a run folder (weights of the selected average), from a folder that `save_pretrained` wrote,
from the hub, or from the wheel (`"builtin"`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from neuromf.conditions import Condition
from neuromf.config import AdaptersConfig, TrainConfig, from_yaml
from neuromf.data.latents import LatentStatistics, class_names
from neuromf.devices import torch_device
from neuromf.errors import UserError
from neuromf.files import atomic_path, read_json, sha256_file, write_json, write_text
from neuromf.losses.path import average_velocity, data_estimate
from neuromf.models.adapters import load_base, merge
from neuromf.models.autoencoder import Autoencoder, load_autoencoder
from neuromf.models.mask_codec import PairLayout
from neuromf.models.networks import build_network
from neuromf.models.state import refuse_differences, state_sha256
from neuromf.sampling.noise import noise_batch
from neuromf.sampling.solvers import SOLVERS, time_grid
from neuromf.training.adapter_file import adapters_of, read_adapters
from neuromf.training.stored import (
    CONFIG_FILE,
    DATA_FILE,
    WEIGHTS_FILE,
    Source,
    average_name,
    find,
    read_best,
    read_weights,
)

Solver = Literal["auto", "meanflow", "euler", "heun"]


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
        self.pair = PairLayout.of(data)
        self._autoencoder: Autoencoder | None = None

    def u(self, z: Tensor, r: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Average velocity u(z_t, r, t), (B, C, I, J, K) whitened."""
        objective = self.config.objective
        output = self.network(z, r, t, *(() if condition is None else (condition,)))
        return average_velocity(output, z, t, objective.prediction, objective.t_min)

    def x_hat(self, z: Tensor, r: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """The network's data estimate at (z_t, r, t), (B, C, I, J, K) whitened."""
        output = self.network(z, r, t, *(() if condition is None else (condition,)))
        return data_estimate(output, z, t, self.config.objective.prediction)

    @property
    def classes(self) -> list[str]:
        """The classes this model can be asked for."""
        return class_names(self.data) if self.config.network.classes else []

    def condition(
        self, n: int, where: Mapping[str, str], guidance: float = 1.0, interval: tuple[float, float] = (0.0, 1.0)
    ) -> Condition | None:
        """The same condition for n samples.

        Args:
            n: how many.
            where: `{"contrast": "T1"}`; empty asks for no class.
            guidance: scale, where the model was trained to take one; 1 is none.
            interval: times inside which guidance acts.

        Raises:
            UserError: a class, a column or a scale the model does not know; the known ones are listed.
        """
        column = (self.data.get("classes") or {}).get("column")
        unknown = [name for name in where if not self.classes or name != column]
        if unknown:
            known = (
                f"it knows {column}: {', '.join(self.classes)}" if self.classes else "it was trained without classes"
            )
            raise UserError(f"this model cannot be asked for {unknown[0]}={where[unknown[0]]}", known)
        if guidance < 1:
            raise UserError(f"a guidance scale of {guidance:g} is none", "give 1 (no guidance) or more")
        if (guidance != 1 or tuple(interval) != (0, 1)) and not self.config.network.guidance:
            asked = f"--guidance {guidance:g}" if guidance != 1 else "--guidance-interval"
            raise UserError(
                f"this model takes no guidance scale ({asked})",
                "train one with network.guidance=true and guidance.enabled=true (preset imf-guided)",
            )
        if not self.classes:
            return None
        label = len(self.classes)
        if where:
            if where[str(column)] not in self.classes:
                raise UserError(
                    f"no {column} '{where[str(column)]}'", f"this model was trained on {', '.join(self.classes)}"
                )
            label = self.classes.index(where[str(column)])
        elif self.config.guidance.label_drop == 0:
            raise UserError(
                "this model was never trained without a class", f"name one: --where {column}={self.classes[0]}"
            )
        labels = torch.full((n,), label, device=self.device)
        if not self.config.network.guidance:
            return Condition(labels)
        omega = torch.full((n,), float(guidance), device=self.device)
        return Condition(labels, omega, torch.tensor(interval, device=self.device).expand(n, 2))

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
    def sample_latents(
        self,
        indices: Sequence[int],
        *,
        nfe: int = 1,
        seed: int = 0,
        solver: Solver = "auto",
        where: Mapping[str, str] = MappingProxyType({}),
        guidance: float = 1.0,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> Tensor:
        """Latents of the samples with these indices, evaluated as one batch.

        Args:
            indices: sample i's noise depends on (seed, i) alone.
            nfe: network evaluations (intervals; Heun costs two each but the last).
            seed: of the noise.
            solver: see `solver`.
            where, guidance, interval: see `condition`.

        Returns:
            (B, C, I, J, K) float32 on the CPU, unwhitened.
        """
        noise = noise_batch(seed, indices, self.latent_shape).to(self.device)
        condition = self.condition(len(indices), where, guidance, interval)
        data = partial(self.x_hat, condition=condition) if self.config.objective.prediction == "x" else None
        u = partial(self.u, condition=condition)
        whitened = SOLVERS[self.solver(solver)](u, noise, time_grid(nfe), data)
        return self.statistics.unwhiten(whitened.float()).cpu()

    @property
    def autoencoder(self) -> Autoencoder:
        """The autoencoder these latents belong to, by hash."""
        if self._autoencoder is None:
            self._autoencoder = matching_autoencoder(self.data["autoencoder"], device=str(self.device))
        return self._autoencoder

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, I, J, K) latents -> (B, 1, 4I, 4J, 4K) volumes, float32, on the CPU; of pairs the images."""
        images = latents if self.pair is None else self.pair.image(latents)
        return self.autoencoder.decode(images.to(self.device)).float().cpu()

    def decode_masks(self, latents: Tensor) -> Tensor:
        """(B, C, I, J, K) latents of pairs -> (B, 1, 4I, 4J, 4K) masks, bool, on the CPU.

        Raises:
            UserError: this model makes images alone.
        """
        if self.pair is None:
            raise UserError("this model makes images without masks", "train one that makes both with `neuromf lora`")
        return self.pair.decode_mask(latents, self.autoencoder)

    def sample(self, n: int, *, batch_size: int = 8, **how: Any) -> Tensor:
        """n volumes (n, 1, I, J, K), float32, intensities as trained (background 0, 99.5th percentile 1).

        Args:
            n: how many.
            batch_size: samples at a time.
            how: nfe, seed, solver, where, guidance, interval of `sample_latents`.

        Example:
            >>> neuromf.load("runs/cpu-small").sample(2).shape  # doctest: +SKIP
            torch.Size([2, 1, 64, 64, 64])
        """
        blocks = [range(start, min(start + batch_size, n)) for start in range(0, n, batch_size)]
        return torch.cat([self.decode(self.sample_latents(block, **how)) for block in blocks])

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the generator alone (weights of the chosen average, settings, statistics), for `load`."""
        folder = Path(folder)
        with atomic_path(folder / WEIGHTS_FILE) as path:
            save_file({k: v.detach().cpu().contiguous() for k, v in self.network.state_dict().items()}, path)
        write_text(folder / CONFIG_FILE, self.config.to_yaml())
        local = {key: value for key, value in self.data.items() if key != "latents"}
        write_json(folder / DATA_FILE, {**local, "ema": self.source.ema, "update": self.source.update})
        return folder


def load(
    source: str | Path,
    *,
    ema: str | float | None = None,
    checkpoint: Literal["newest", "best"] = "newest",
    base: str | Path | None = None,
    device: str = "auto",
) -> Generator:
    """A generator from a run folder, an exported folder, a file of adapters, `"builtin"`, or a hub id `owner/name`.

    Adapters are merged with their base: a plain network comes back.

    Args:
        source: where it lies.
        ema: the average to use, a decay or a half-life as in `500kimg`; the run's `ema.select` when None. Exported
            folders hold one.
        checkpoint: a run's newest, or the `best`: its selected average where the validation loss was the lowest.
        base: of adapters, where it does not lie any more where they were trained.
        device: auto, cpu, cuda or mps.

    Raises:
        UserError: nothing there, no checkpoint yet, no such average, or adapters without their base.
    """
    name = None if ema is None else average_name(ema)
    if Path(source).suffix == ".safetensors":
        config, data, weights, origin = _adapter_file(Path(source), name)
    else:
        folder = find(source)
        config, data = from_yaml(folder / CONFIG_FILE), read_json(folder / DATA_FILE)
        weights, origin = read_best(folder, name) if checkpoint == "best" else read_weights(folder, config, data, name)
    whole: Any = build_network(config.network.model_dump(), data["latent_shape"], classes=len(class_names(data)))
    if config.adapters.base is not None:
        whole = _merged(config, data, weights, whole, find_base(config, data, base, beside=Path(origin.path)))
        weights, config = whole.state_dict(), config.model_copy(update={"adapters": AdaptersConfig()})
    network = whole.without_v_head() if config.network.v_head_blocks else whole
    second_head = whole.state_dict().keys() - network.state_dict().keys()
    network.load_state_dict({name: value for name, value in weights.items() if name not in second_head})
    return Generator(network, config, data, origin, torch_device(device))


def matching_autoencoder(
    recorded: dict[str, Any], *, weights: Path | None = None, device: str = "auto", memory: int | None = None
) -> Autoencoder:
    """The autoencoder that latents were made with.

    Args:
        recorded: {name, sha256} as latents and runs store it.
        weights: file of a foreign autoencoder, where it is not found by name.
        memory: bytes it may take on the device; None looks at what is free.

    Raises:
        UserError: it cannot be loaded, or its weights have another hash.
    """
    autoencoder = load_autoencoder(recorded["name"], device=torch_device(device), weights=weights, memory=memory)
    if autoencoder.sha256 != recorded["sha256"]:
        raise UserError(
            f"these latents were made by the autoencoder '{recorded['name']}' ({recorded['sha256'][:12]}...), "
            f"the one at hand has {autoencoder.sha256[:12]}...",
            "decode with the weights they were made with (--weights FILE): another decoder gives meaningless volumes",
        )
    return autoencoder


def find_base(
    config: TrainConfig, data: Mapping[str, Any], given: str | Path | None = None, *, beside: Path | None = None
) -> Generator:
    """The generator that adapters belong to, known by its weights.

    Args:
        config, data: of the adapted run.
        given: where it lies; None looks where it lay in training, and beside the run.
        beside: the run's folder.

    Raises:
        UserError: it is not there, or has other weights.
    """
    wanted, named = data["base"], str(config.adapters.base)
    places = [str(wanted.get("path", named)), named, *([str(beside.parent / Path(named).name)] if beside else [])]
    found = [place for place in dict.fromkeys([str(given)] if given else places) if given or _is_there(place)]
    for place in found:
        base = load(place, device="cpu")
        if (sha256 := state_sha256(base.network.state_dict())) == wanted["sha256"]:
            return base
        places = [f"{place} (it has {sha256[:12]}...)"]
    raise UserError(
        f"these adapters belong to a base with the weights {wanted['sha256'][:12]}..., and it is not at "
        + " or ".join(dict.fromkeys(places)),
        "say where it lies: neuromf lora --merge RUN --base BASE --out FOLDER",
    )


def _is_there(place: str) -> bool:
    return place == "builtin" or (Path(place) / CONFIG_FILE).is_file()


def _adapter_file(path: Path, ema: str | None) -> tuple[TrainConfig, dict[str, Any], dict[str, Tensor], Source]:
    held = read_adapters(path)
    if ema not in (None, held.ema):
        raise UserError(f"{path} holds the average {held.ema} alone, not {ema}", "leave --ema out")
    return held.config, held.data, held.weights, Source(str(path.parent), sha256_file(path), held.update, held.ema)


def _merged(
    config: TrainConfig, data: dict[str, Any], weights: Mapping[str, Tensor], plain: nn.Module, base: Generator
) -> nn.Module:
    """A plain network that answers as the base with these adapters does."""
    settings, shape = config.network.model_dump(), data["latent_shape"]
    network = build_network(settings, shape, adapters=adapters_of(config, data))
    load_base(network, base.network.state_dict())
    refuse_differences("these adapters do not fit the settings", weights, network.state_dict(), "copy the run again")
    network.load_state_dict(dict(weights))
    return merge(network, plain)
