"""Exponential moving averages of the weights: theta_bar <- beta theta_bar + (1 - beta) theta."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from neuromf.config import EmaConfig
from neuromf.errors import UserError
from neuromf.training.sharding import exchange_weights, local, shard_like


def half_life_decay(half_life_images: float, batch: int, update: int, ramp: float = 0.05) -> float:
    """beta = 0.5^(B / max(min(H, ramp B n), 1e-8)) (EDM's warm-up, as pMF uses it).

    Args:
        half_life_images: H, in images.
        batch: B, global batch.
        update: n, number of updates including this one (1 at the first).
        ramp: share of the training so far that the half-life may cover.
    """
    return 0.5 ** (batch / max(min(half_life_images, ramp * batch * update), 1e-8))


class Decay(Protocol):
    """What an average keeps of itself at one update. Nothing is remembered, so resuming needs the number alone."""

    def beta(self, update: int, batch: int) -> float:
        """The factor at update number `update` (1 at the first) with `batch` images per update."""

    def window(self, batch: int) -> float:
        """How many updates are averaged over, once any ramp is behind."""

    def advice(self, updates: int, batch: int) -> str:
        """What a window too long for a run of `updates` means, and which decay fits."""


@dataclass(frozen=True)
class Constant:
    """The same beta at every update, whatever the batch."""

    value: float

    def beta(self, update: int, batch: int) -> float:
        """The value."""
        return self.value

    def window(self, batch: int) -> float:
        """1 / (1 - beta)."""
        return 1 / (1 - self.value)

    def advice(self, updates: int, batch: int) -> str:
        """The largest decay whose window is 10 % of the run."""
        fitting = max(math.floor((1 - 10 / updates) * 1e5) / 1e5, 0.5)
        return f"it will lag behind the network; a decay of {fitting:g} or less fits"


@dataclass(frozen=True)
class HalfLife:
    """The weights of `kimg` thousand images ago count half; early on a share `ramp` of the images seen instead."""

    kimg: float
    ramp: float = 0.05

    def beta(self, update: int, batch: int) -> float:
        """See `half_life_decay`."""
        return half_life_decay(1000 * self.kimg, batch, update, self.ramp)

    def window(self, batch: int) -> float:
        """H / ln 2 in updates: the mean age of what is averaged."""
        return 1000 * self.kimg / math.log(2) / batch

    def advice(self, updates: int, batch: int) -> str:
        """The largest half-life that the ramp reaches."""
        reached = self.ramp * updates * batch / 1000
        return (
            f"it never gets beyond its ramp ({self.ramp:.0%} of the images seen), like any longer half-life; "
            f"{reached:.3g}kimg or less fits"
        )


def named_decays(config: EmaConfig) -> dict[str, Decay]:
    """The configured decays by the name of their average, such as `0.9995` or `500kimg`."""
    decays: list[Decay] = [*map(Constant, config.decays), *map(HalfLife, config.half_lives_kimg)]
    return dict(zip(config.names, decays, strict=True))


class WeightAverage:
    """One moving average of a network's parameters, on their device.

    It has the parameters' precision, at least float32. (A lerp in float64 that is rounded to float32 costs five times
    as much and differs by one unit in the last place in one of 4,000 weights.)

    Args:
        network: its present parameters are the starting point.
        decay: beta at each update.
        every: n; the average moves at every n-th update only, with beta^n.
    """

    def __init__(self, network: nn.Module, decay: Decay, every: int = 1) -> None:
        self.decay, self.every = decay, every
        self.weights = {
            name: p.detach().clone().to(torch.promote_types(p.dtype, torch.float32))
            for name, p in network.named_parameters()
        }

    @torch.no_grad()
    def update(self, network: nn.Module, update: int, batch: int) -> None:
        """Move the average towards the network's parameters by 1 - beta^n, or not at all between every n-th update.

        Args:
            network: after this update.
            update: number of updates including this one (1 at the first).
            batch: images per update, over all processes.
        """
        if update % self.every:
            return
        averages = [local(average) for average in self.weights.values()]
        new = [local(p.detach()).to(a.dtype) for p, a in zip(network.parameters(), averages, strict=True)]
        torch._foreach_lerp_(averages, new, 1 - self.decay.beta(update, batch) ** self.every)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take over saved averages; names must match exactly."""
        if weights.keys() != self.weights.keys():
            raise UserError("the saved average belongs to another network", "resume with the run's own configuration")
        for name, value in weights.items():
            self.weights[name].copy_(shard_like(value, self.weights[name]))


def build_averages(network: nn.Module, config: EmaConfig) -> dict[str, WeightAverage]:
    """The configured averages of a network, by name, starting at its present weights."""
    return {name: WeightAverage(network, decay, config.every) for name, decay in named_decays(config).items()}


@contextmanager
def averaged_weights(network: nn.Module, average: WeightAverage) -> Iterator[None]:
    """Let the network use the averaged weights inside the block; the trained ones come back bit for bit."""
    trained = exchange_weights(network, average.weights)
    try:
        yield
    finally:
        exchange_weights(network, trained)


def window_warning(name: str, decay: Decay, updates: int, batch: int) -> str | None:
    """A sentence when the averaging window exceeds 10 % of the planned updates.

    Args:
        name: what the average is called.
        decay: its decay.
        updates: planned.
        batch: images per update, over all processes.
    """
    window = decay.window(batch)
    if window <= 0.1 * updates * (1 + 1e-9):
        return None
    return (
        f"ema {name} means an average over about {window:,.0f} updates, more than 10 % of the {updates:,} planned: "
        f"{decay.advice(updates, batch)}"
    )
