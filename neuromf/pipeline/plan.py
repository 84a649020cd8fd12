"""What a run would do and need, said before anything is done."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from neuromf.config import TrainConfig
from neuromf.data.latents import class_names
from neuromf.errors import UserError
from neuromf.models.networks import build_network, check_latent_size
from neuromf.training import memory
from neuromf.training.ema import named_decays, window_warning
from neuromf.training.feed import Clock

SMALLER_PRESET = {"imf-xpred": "imf-xpred-small", "imf-upred": "imf-xpred-small", "rectflow": "imf-xpred-small"}


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


def plan_run(
    config: TrainConfig, description: dict[str, Any], *, latents: int | None = None, device: str = "auto"
) -> Plan:
    """Parameters, memory, disk, updates and warnings of a run; nothing is written or held.

    Args:
        config: resolved settings.
        description: of the data, as data.json holds it.
        latents: how many are trained on, flipped copies counted; the training subjects when None.
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
        ghost = build_network(network, shape, classes=len(class_names(description)))
    averages = named_decays(config.ema)
    need = memory.estimate(ghost, shape, training.batch_size, len(averages), half, bool(config.network.v_head_blocks))
    subjects = int(description["subjects"]["train"])
    clock = Clock(subjects if latents is None else latents, training.batch_size * training.accumulation, config)
    total, name = memory.available(device)
    disk = need.parameters * 4 * _kept_copies(config, clock.updates, len(averages))
    found = (window_warning(n, decay, clock.updates, clock.batch) for n, decay in averages.items())
    warnings = [text for text in found if text]
    if half and config.objective.name == "alphaflow":
        warnings.append(
            "alphaflow divides a difference of two velocities by flow_alpha, down to 0.005, and bf16 keeps 8 bits of "
            "them: training.precision=fp32 is safe"
        )
    if training.precision == "bf16" and not on_cuda:
        warnings.append(
            "bf16 on a CPU: torch 2.13 gives wrong Conv3d weight gradients on grids of 2^3 cells; fp32 is safe"
        )
    return Plan(config, shape, subjects, clock.updates, need, total, name, disk, warnings)


def _check_channels(config: TrainConfig, channels: int) -> None:
    for name in ("lp", "channel_weights"):
        given = getattr(config.objective, name)
        if isinstance(given, tuple) and len(given) != channels:
            raise UserError(
                f"objective.{name} has {len(given)} entries, and these latents have {channels} channels",
                "give one entry per channel",
            )


def _kept_copies(config: TrainConfig, updates: int, averages: int) -> int:
    """How many float32 copies of the weights end on disk: each checkpoint holds the weights, the averages and two
    moments of the optimiser, and one is in the making while the others are kept; and the best average."""
    intervals = config.intervals
    never_rotated = updates // intervals.keep_every if intervals.keep_every else 0
    return (3 + averages) * (intervals.keep_checkpoints + never_rotated + 1) + 1


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
