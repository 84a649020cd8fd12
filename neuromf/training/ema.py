"""Exponential moving averages of the weights: theta_bar <- beta theta_bar + (1 - beta) theta."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from neuromf.errors import UserError


def half_life_decay(half_life_images: float, batch: int, update: int, ramp: float = 0.05) -> float:
    """beta = 0.5^(B / max(min(H, ramp B n), 1e-8)) (EDM's warm-up, as pMF uses it).

    Args:
        half_life_images: H, in images.
        batch: B, global batch.
        update: n, number of updates including this one (1 at the first).
        ramp: share of the training so far that the half-life may cover.
    """
    return 0.5 ** (batch / max(min(half_life_images, ramp * batch * update), 1e-8))


class WeightAverage:
    """One moving average of a network's parameters, float32, on their device.

    Args:
        network: its present parameters are the starting point.
        decay: beta, constant.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: p.detach().clone().float() for name, p in network.named_parameters()}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Move the average towards the network's parameters by 1 - decay."""
        new = [p.detach().float() for p in network.parameters()]
        torch._foreach_lerp_(list(self.weights.values()), new, 1 - self.decay)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take over saved averages; names must match exactly."""
        if weights.keys() != self.weights.keys():
            raise UserError("the saved average belongs to another network", "resume with the run's own configuration")
        for name, value in weights.items():
            self.weights[name].copy_(value)


@contextmanager
def averaged_weights(network: nn.Module, average: WeightAverage) -> Iterator[None]:
    """Let the network use the averaged weights inside the block; the trained ones come back bit for bit."""
    parameters = dict(network.named_parameters())
    trained = {name: p.data for name, p in parameters.items()}
    try:
        for name, p in parameters.items():
            p.data = average.weights[name].to(p.dtype)
        yield
    finally:
        for name, p in parameters.items():
            p.data = trained[name]


def window_warning(decay: float, updates: int) -> str | None:
    """A sentence when the averaging window 1 / (1 - beta) exceeds 10 % of the planned updates."""
    window = 1 / (1 - decay)
    if window <= 0.1 * updates * (1 + 1e-9):
        return None
    fitting = max(math.floor((1 - 10 / updates) * 1e5) / 1e5, 0.5)
    return (
        f"ema {decay:g} averages over about {window:,.0f} updates, more than 10 % of the {updates:,} planned: it will "
        f"lag behind the network; a decay of {fitting:g} or less fits"
    )
