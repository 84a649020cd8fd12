"""Pairs of times (r, t): pure transforms of draws that somebody else made.

The three orders of pairing are those of the published codes; they differ in which t a sample with r = t gets
(the larger of two draws, or simply the first).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Order = Literal["sort-then-mask", "mask-then-sort", "min"]


def logit_normal(normal: Tensor, mean: float, std: float) -> Tensor:
    """sigmoid(mean + std n) for standard-normal draws n of any shape."""
    return torch.sigmoid(mean + std * normal)


def mix_uniform(times: Tensor, uniform: Tensor, chooser: Tensor, share: float) -> Tensor:
    """Replace times by uniform draws where `chooser` (uniform in [0, 1)) falls below `share` (pMF's 10 %)."""
    return torch.where(chooser < share, uniform, times)


def pair(first: Tensor, second: Tensor, equal: Tensor, order: Order = "sort-then-mask") -> tuple[Tensor, Tensor]:
    """Make (r, t) with r <= t from two draws, and r = t where `equal`.

    Args:
        first: (B,) draws of the t distribution.
        second: (B,) draws of the r distribution.
        equal: (B,) bool, the samples that train the instantaneous velocity.
        order: `sort-then-mask` (MeanFlow, iMF), `mask-then-sort` (pMF), `min` (py-meanflow v1: r never
            exceeds the t that was drawn, t stays).

    Returns:
        (r, t), each (B,).
    """
    if order == "sort-then-mask":
        t, r = torch.maximum(first, second), torch.minimum(first, second)
        return torch.where(equal, t, r), t
    second = torch.where(equal, first, second)
    if order == "mask-then-sort":
        return torch.minimum(first, second), torch.maximum(first, second)
    return torch.minimum(first, second), first


def clamp_times(r: Tensor, t: Tensor, t_min: float) -> tuple[Tensor, Tensor]:
    """Lift t to at least `t_min`; r follows where r = t, and never exceeds t."""
    lifted = t.clamp(min=t_min)
    return torch.where(r == t, lifted, torch.minimum(r, lifted)), lifted


def limit_gap(r: Tensor, t: Tensor, gap: float) -> Tensor:
    """r raised until t - r <= gap (the curriculum of gaps); (B,), (B,) -> (B,)."""
    return torch.maximum(r, t - gap)


def equal_mask(batch: int, data_proportion: float, rounding: Tensor, order: Tensor) -> Tensor:
    """Which samples of a batch get r = t.

    The number of r < t samples is batch x (1 - data_proportion), rounded up or down at random so that it is
    exact in expectation (a batch of one works); their places are a random subset, never an index range.

    Args:
        batch: B.
        data_proportion: share with r = t, in [0, 1].
        rounding: one uniform draw in [0, 1), shape ().
        order: (B,) uniform draws whose ranking picks the places.

    Returns:
        (B,) bool, True where r = t.
    """
    moving = int(torch.floor(batch * (1 - data_proportion) + rounding).item())
    mask = torch.ones(batch, dtype=torch.bool, device=order.device)
    mask[order.argsort()[: min(moving, batch)]] = False
    return mask
