"""Intervals for every number: a seeded bootstrap whose result depends on the seed and the data only."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from neuromf.errors import UserError


class Estimate(NamedTuple):
    """A number with its interval: `value`, `low`, `high` (same unit) from `n` independent items."""

    value: float
    low: float
    high: float
    n: int


def bootstrap_interval(
    *samples: Tensor,
    statistic: Callable[..., Tensor],
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> Estimate:
    """Percentile bootstrap (Efron 1979) of `statistic(*samples)`.

    Each sample is resampled along its first axis, independently of the others. Not for statistics that see
    a repeated item as new information (KID, Frechet): those have intervals of their own. For functions of
    means, `bootstrap_of_means` gives the same, faster.

    Args:
        samples: tensors (N, ...), one row per independent item; lengths may differ.
        statistic: takes as many tensors as there are samples, returns one number.
        seed: keys the resampling; the same seed and data give the same interval.

    Returns:
        The statistic on the data itself, its interval at `level`, and the smallest N.

    Raises:
        UserError: no sample, or an empty one.
    """
    _check(samples)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.empty(resamples, dtype=torch.float64)
    for b in range(resamples):
        rows = [torch.randint(len(sample), (len(sample),), generator=generator) for sample in samples]
        draws[b] = statistic(*(sample[row] for sample, row in zip(samples, rows, strict=True)))
    return _percentiles(float(statistic(*samples)), draws, samples, level)


def bootstrap_of_means(
    *samples: Tensor,
    function: Callable[..., Tensor] | None = None,
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> Estimate:
    """Percentile bootstrap of a function of the samples' means; of the mean itself by default.

    All resamples at once: each is a row of weights, so the means (R, ...) are one matrix product.

    Args:
        samples: tensors (N, ...), as in `bootstrap_interval`.
        function: takes the means of each sample, (R, ...) each, returns (R,).

    Raises:
        UserError: no sample, or an empty one.
    """
    _check(samples)
    function = function or (lambda means: means)
    generator = torch.Generator().manual_seed(seed)
    means = []
    for sample in samples:
        n = len(sample)
        rows = torch.randint(n, (resamples, n), generator=generator)
        weights = torch.zeros(resamples, n, dtype=torch.float64)
        weights.scatter_add_(1, rows, torch.full((resamples, n), 1 / n, dtype=torch.float64))
        means.append((weights @ sample.double().reshape(n, -1)).reshape(resamples, *sample.shape[1:]))
    value = float(function(*(sample.double().mean(0, keepdim=True) for sample in samples)))
    return _percentiles(value, function(*means), samples, level)


def _check(samples: tuple[Tensor, ...]) -> None:
    if not samples or any(len(sample) == 0 for sample in samples):
        raise UserError("an interval needs at least one value", "give a set that is not empty")


def _percentiles(value: float, draws: Tensor, samples: tuple[Tensor, ...], level: float) -> Estimate:
    tail = (1 - level) / 2
    low, high = torch.quantile(draws, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Estimate(value, low, high, min(len(sample) for sample in samples))


def proportion_interval(count: int, n: int, *, level: float = 0.95) -> Estimate:
    """A proportion count / n with Wilson's score interval (1927), which is not empty at 0 or n either.

    Raises:
        UserError: n below 1.
    """
    if n < 1:
        raise UserError("a proportion of nothing has no interval", "give a set that is not empty")
    z = math.sqrt(2) * float(torch.erfinv(torch.tensor(level, dtype=torch.float64)))
    share = count / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half_width = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return Estimate(share, max(centre - half_width, 0.0), min(centre + half_width, 1.0), n)
