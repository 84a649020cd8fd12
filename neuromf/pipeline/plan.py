"""What a run would do and need, said before anything is done."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from neuromf.config import TrainConfig
from neuromf.data.latents import class_names
from neuromf.errors import UserError
from neuromf.launch import process_count
from neuromf.models.adapters import frozen_count
from neuromf.models.networks import build_network, check_latent_size, parameter_count
from neuromf.training import memory
from neuromf.training.adapter_file import adapters_of
from neuromf.training.ema import named_decays, window_warning
from neuromf.training.feed import Clock
from neuromf.training.objective import Objective
from neuromf.training.validation import COLLECTED_NFE

SMALLER_PRESET = {"imf-xpred": "imf-xpred-small", "imf-upred": "imf-xpred-small", "rectflow": "imf-xpred-small"}
LONGEST_WARMUP = 0.2
FEW_UPDATES, USUAL_UPDATES = 10_000, 100_000


class Average(NamedTuple):
    """A moving average of the weights: its window in updates, and as a share of the run."""

    name: str
    window: float
    share: float
    selected: bool


class Disk(NamedTuple):
    """Bytes: all kept checkpoints and the one in the making, the best average, and the samples."""

    checkpoints: int
    best: int
    samples: int


@dataclass(frozen=True)
class Plan:
    """What a run would do and need, without doing it.

    latents: trained on, copies counted. parameters: by part. batch: per process, accumulated, processes.
    written: how many checkpoints. validations, drawn: how often the run validates and draws samples.
    """

    config: TrainConfig
    latent_shape: tuple[int, ...]
    subjects: int
    latents: int
    parameters: dict[str, int]
    batch: tuple[int, int, int]
    updates: int
    epochs: int
    averages: list[Average]
    memory: memory.Memory
    device_memory: int
    device: str
    disk: Disk
    written: int
    validations: int
    drawn: int
    warnings: list[str]

    @property
    def warmup(self) -> float:
        """Share of the updates in which the learning rate still rises."""
        return min(self.config.training.warmup_steps / self.updates, 1.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        size, accumulation, processes = self.batch
        return {
            "config": self.config.model_dump(mode="json"),
            "latent_shape": list(self.latent_shape),
            "subjects": self.subjects,
            "latents": self.latents,
            "parameters": {**self.parameters, "total": sum(self.parameters.values())},
            "batch": {
                "per_process": size,
                "accumulation": accumulation,
                "processes": processes,
                "total": math.prod(self.batch),
            },
            "updates": self.updates,
            "epochs": self.epochs,
            "images": self.updates * math.prod(self.batch),
            "warmup": {"updates": self.config.training.warmup_steps, "share": self.warmup},
            "averages": [average._asdict() for average in self.averages],
            "memory_bytes": {**self.memory._asdict(), "total": self.memory.total, "available": self.device_memory},
            "device": self.device,
            "disk_bytes": {**self.disk._asdict(), "total": sum(self.disk)},
            "checkpoints": self.written,
            "validations": self.validations,
            "samples_drawn": self.drawn,
            "warnings": self.warnings,
        }

    def lines(self) -> list[str]:
        """The plan as a table; the settings are left to `--json`."""
        shape = " x ".join(map(str, self.latent_shape))
        copies = f", {self.latents} with their copies" if self.latents != self.subjects else ""
        rows = {
            "preset": f"{self.config.preset} (all settings of this run: --json)",
            "data": f"{self.subjects} training latents of {shape}{copies}",
            **self._rows(),
        }
        return [*(f"{name:<12}{text}" for name, text in rows.items()), *self._warned()]

    def brief(self) -> list[str]:
        """What a run says of itself as it begins."""
        rows = self._rows()
        return [*(f"{name}: {rows[name]}" for name in ("network", "updates", "memory", "disk")), *self._warned()]

    def _warned(self) -> list[str]:
        return [f"warning: {text}" for text in self.warnings]

    def _rows(self) -> dict[str, str]:
        size, accumulation, processes = self.batch
        total, config = math.prod(self.batch), self.config
        return {
            "network": f"{config.network.name}, {_parts(self.parameters)}",
            "batch": f"{total:,} images an update = {size} at a time x {accumulation} accumulated x "
            f"{_count(processes, 'process', 'processes')}",
            "updates": f"{self.updates:,} in {_count(self.epochs, 'epoch')}, {self.updates * total:,} images",
            "warm-up": f"{_count(config.training.warmup_steps, 'update')}, {_percent(self.warmup)} of the run",
            **{
                f"ema {a.name}": f"averages over {a.window:,.0f} updates, {_percent(a.share)} of the run"
                + (" (used for validation and samples)" if a.selected else "")
                for a in self.averages
            },
            "memory": self._memory(),
            "disk": f"about {_size(sum(self.disk))}: checkpoints {_size(self.disk.checkpoints)}, best weights "
            f"{_size(self.disk.best)}, samples {_size(self.disk.samples)}",
            "checkpoints": f"every {_count(config.intervals.checkpoint_updates, 'update')}, {self.written:,} in all",
            "looks": f"{_count(self.validations, 'validation')}, {_count(self.drawn, 'drawing')} of samples",
        }

    def _memory(self) -> str:
        need = self.memory
        parts = {
            "weights": need.weights,
            "gradients": need.gradients,
            self.config.training.optimizer: need.optimizer,
            _count(len(self.averages), "average"): need.averages,
            "activations": need.activations,
            "du/dt": need.derivative,
        }
        each = ", ".join(f"{name} {_size(value)}" for name, value in parts.items() if value)
        return f"about {_size(need.total)} ({each}, a tenth to spare); {self.device} has {_size(self.device_memory)}"


def _parts(parameters: dict[str, int]) -> str:
    """Numbers of parameters, the second head and what the objective learns apart."""
    if frozen := parameters.get("frozen"):
        learned = sum(parameters.values()) - frozen
        return f"{_millions(learned)} parameters beside {_millions(frozen)} frozen ones"
    more = [f"{name} {_millions(n)}" for name, n in parameters.items() if n and name != "network"]
    return f"{_millions(sum(parameters.values()))} parameters" + (f" ({', '.join(more)} of them)" if more else "")


def _millions(n: int) -> str:
    return f"{n / 1e6:.2f} M" if n >= 10_000 else f"{n:,}"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:,.0f} %"


def _size(n: int) -> str:
    return f"{n / memory.GIB:.1f} GiB" if n >= memory.GIB else f"{n / 2**20:.1f} MiB"


def _count(n: int, one: str, many: str = "") -> str:
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def plan_run(
    config: TrainConfig, description: dict[str, Any], *, latents: int | None = None, device: str = "auto"
) -> Plan:
    """Parameters, memory, disk, updates and warnings of a run; nothing is written or held.

    Args:
        config: resolved settings.
        description: of the data, as data.json holds it.
        latents: how many are trained on, copies counted; the training subjects when None.
        device: auto, cpu, cuda or mps.

    Raises:
        UserError: a size the network cannot take, classes the latents do not carry, or settings for other channels.
    """
    shape = tuple(description["latent_shape"])
    _check_channels(config, shape[0])
    training, network = config.training, config.network.model_dump()
    check_latent_size(network, shape[1:], description["autoencoder"].get("factor", 4))
    on_cuda = device != "cpu" and torch.cuda.is_available()
    half = training.precision == "bf16" or (training.precision == "auto" and on_cuda)
    with torch.device("meta"):
        ghost = Objective(
            build_network(
                network, shape, classes=len(class_names(description)), adapters=adapters_of(config, description)
            ),
            config.objective,
            channels=shape[0],
        )
    batch = (training.batch_size, training.accumulation, process_count())
    subjects = int(description["subjects"]["train"])
    clock = Clock(subjects if latents is None else latents, math.prod(batch), config)
    total, name = memory.available(device)
    expected = Plan(
        config=config,
        latent_shape=shape,
        subjects=subjects,
        latents=clock.samples,
        parameters=_split(ghost),
        batch=batch,
        updates=clock.updates,
        epochs=math.ceil(clock.updates / clock.epoch_updates),
        averages=_averages(config, clock),
        memory=memory.estimate(ghost, shape, config, half=half, on_cpu=not on_cuda),
        device_memory=total,
        device=name,
        disk=Disk(0, 0, 0),
        written=_written(config, clock.updates),
        validations=0,
        drawn=0,
        warnings=_warnings(config, clock, half, on_cuda),
    )
    expected = replace(
        expected,
        validations=_times(expected.epochs, config.intervals.validation),
        drawn=_times(expected.epochs, config.intervals.samples),
    )
    return replace(expected, disk=_disk(expected))


def _check_channels(config: TrainConfig, channels: int) -> None:
    for name in ("lp", "channel_weights"):
        given = getattr(config.objective, name)
        if isinstance(given, tuple) and len(given) != channels:
            raise UserError(
                f"objective.{name} has {len(given)} entries, and these latents have {channels} channels",
                "give one entry per channel",
            )


def _split(objective: Objective) -> dict[str, int]:
    """Trainable parameters of the network, of its second head and of the objective itself, and what is frozen."""
    whole = parameter_count(objective.network)
    heads = [
        getattr(part, name)
        for part in objective.network.modules()
        for name in getattr(part, "V_HEAD_MODULES", ())
        if getattr(part, name, None) is not None
    ]
    second = sum(parameter_count(head) for head in heads)
    own = parameter_count(objective) - whole
    parts = {"network": whole - second, "second head": second, "learned by the objective": own}
    return parts | ({"frozen": frozen} if (frozen := frozen_count(objective.network)) else {})


def _averages(config: TrainConfig, clock: Clock) -> list[Average]:
    windows = {name: decay.window(clock.batch) for name, decay in named_decays(config.ema).items()}
    return [Average(n, window, window / clock.updates, n == config.ema.selected) for n, window in windows.items()]


def _times(epochs: int, every: int) -> int:
    """How often something happens that is due every n-th epoch and in the last."""
    return math.ceil(epochs / every)


def _written(config: TrainConfig, updates: int) -> int:
    """How many checkpoints a run writes: every n updates, those to keep, and the last."""
    every = [n for n in (config.intervals.checkpoint_updates, config.intervals.keep_every) if n]
    due = sum(updates // n for n in every) - (updates // math.lcm(*every) if len(every) > 1 else 0)
    return due + all(updates % n for n in every)


def _disk(plan: Plan) -> Disk:
    """Each checkpoint holds the trained weights, the averages and the optimiser's moments, in float32."""
    need, intervals = plan.memory, plan.config.intervals
    never_rotated = plan.updates // intervals.keep_every if intervals.keep_every else 0
    kept = min(intervals.keep_checkpoints + never_rotated, plan.written) + 1
    samples = plan.drawn * intervals.sample_count * len(COLLECTED_NFE) * math.prod(plan.latent_shape) * 4
    trained = need.gradients
    return Disk((trained + need.averages + need.optimizer) * kept, trained, samples)


def _warnings(config: TrainConfig, clock: Clock, half: bool, on_cuda: bool) -> list[str]:
    training, updates = config.training, clock.updates
    found = [window_warning(n, decay, updates, clock.batch) for n, decay in named_decays(config.ema).items()]
    warnings = [text for text in found if text]
    if training.warmup_steps > LONGEST_WARMUP * updates:
        warnings.append(
            f"the learning rate rises for {training.warmup_steps:,} of {updates:,} updates "
            f"({min(training.warmup_steps / updates, 1):.0%}): training.warmup_steps={max(updates // 20, 1)} would do"
        )
    if updates < FEW_UPDATES:
        warnings.append(
            f"{updates:,} updates are few: published runs have about {USUAL_UPDATES:,} or more; raise training.epochs "
            f"or training.updates, or lower the batch of {clock.batch:,}"
        )
    if half and config.objective.name == "alphaflow":
        warnings.append(
            "alphaflow divides a difference of two velocities by flow_alpha, down to 0.005, and bf16 keeps 8 bits of "
            "them: training.precision=fp32 is safe"
        )
    if training.precision == "bf16" and not on_cuda:
        warnings.append(
            "bf16 on a CPU: torch 2.13 gives wrong Conv3d weight gradients on grids of 2^3 cells; fp32 is safe"
        )
    if config.objective.perceptual_weight:
        warnings.append("the estimate of memory leaves out the decoder of objective.perceptual_weight")
    return warnings


def refuse_too_large(expected: Plan) -> None:
    """Stop before a run that cannot fit.

    Raises:
        UserError: more memory needed than the device has, with what to lower.
    """
    if expected.memory.total <= expected.device_memory:
        return
    smaller = SMALLER_PRESET.get(expected.config.preset)
    raise UserError(
        f"this run needs about {expected.memory.total / memory.GIB:.1f} GiB and {expected.device} has "
        f"{expected.device_memory / memory.GIB:.1f} GiB",
        "lower training.batch_size (and raise training.accumulation)"
        + (f", or use --preset {smaller}" if smaller else ""),
    )
