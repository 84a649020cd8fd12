"""Distances between two sets of feature vectors; features in, numbers out, float64 throughout.

Which features they are is the caller's to say: "FID" is a Frechet distance of a published network's. A set is
(N, D), one vector per volume, or (N, S, D), one per slice: the Frechet distance then takes slices as its items, as
slice-wise FIDs do; the kernel distances compare volumes, two of which are as similar as their slices are on average.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from neuromf.errors import UserError
from neuromf.metrics.statistics import Estimate

Shrinkage = Literal["none", "ledoit-wolf"]
Kernel = Callable[[Tensor, Tensor], Tensor]
"""(n, D), (m, D) -> (n, m)."""

_ROWS = 2048  # converted to float64 at once
_NOT_FINITE, _FIND = "the features hold NaN or Inf", "find the volume that is not finite and leave it out"
_MEDIAN_ROWS = 2000


class _Gaussian(NamedTuple):
    """A covariance (r, r) in the coordinates of some r directions, and the variance in each of the D - r others."""

    covariance: Tensor
    elsewhere: float


def frechet_distance(features_a: Tensor, features_b: Tensor, *, shrinkage: Shrinkage = "none") -> float:
    """Frechet distance of two Gaussians fitted to the features (Heusel et al. 2017, equation 6).

    d^2 = |m_a - m_b|^2 + tr(S_a + S_b) - 2 tr((S_a^1/2 S_b S_a^1/2)^1/2), by eigenvalues of symmetric
    matrices, so nothing complex can appear; fewer items than D are compared in the space they span, which is
    exact and fast. It is biased upwards by an amount that grows with D / N: compare only distances of equal N,
    and set a real-against-real distance of the same N beside each.

    Args:
        features_a: (N, D), or (N, S, D).
        features_b: (M, D), or (M, S, D).
        shrinkage: `none` for the unbiased sample covariances (rank N - 1 at most); `ledoit-wolf` for
            shrunk ones, to be labelled "shrunk" wherever the number is shown.

    Raises:
        UserError: N or M below 2, different D, or values that are not finite.
    """
    _check(features_a, features_b, least=2)
    a, b = (x.reshape(-1, x.shape[-1]) for x in (features_a, features_b))
    mean_a, mean_b = _mean(a), _mean(b)
    dimension, rest = a.shape[1], 0
    squared = (mean_a - mean_b).square().sum()
    if len(a) + len(b) < dimension:
        a, b = a.double() - mean_a, b.double() - mean_b
        basis = torch.linalg.qr(torch.cat([a, b]).T).Q
        a, b, rest = a @ basis, b @ basis, dimension - basis.shape[1]
    fit_a, fit_b = (_fit(x, shrinkage, dimension) for x in (a, b))
    squared = squared + _bures(fit_a.covariance, fit_b.covariance)
    squared = squared + rest * (fit_a.elsewhere**0.5 - fit_b.elsewhere**0.5) ** 2
    return max(float(squared), 0.0)


class Moments(NamedTuple):
    """How many items there are, their mean (D,) and unbiased sample covariance (D, D), float64."""

    n: int
    mean: Tensor
    covariance: Tensor


def moments(parts: Iterable[Tensor]) -> Moments:
    """Moments of items that come in parts (n, D), which need not fit in memory together.

    Raises:
        UserError: fewer than 2 items, or values that are not finite.
    """
    n, shift, first, second = 0, torch.zeros(0), torch.zeros(0), torch.zeros(0)
    for part in parts:
        if not part.isfinite().all():
            raise UserError(_NOT_FINITE, _FIND)
        x = part.double()
        if n == 0:  # sums about a point near the mean lose no digits
            shift = x.mean(0)
            first, second = torch.zeros_like(shift), shift.new_zeros(len(shift), len(shift))
        x = x - shift
        n, first, second = n + len(x), first + x.sum(0), second + x.T @ x
    if n < 2:
        raise UserError(f"a covariance needs at least 2 items, got {n}", "generate or provide more volumes")
    mean = first / n
    return Moments(n, shift + mean, (second - n * torch.outer(mean, mean)) / (n - 1))


def frechet_of_moments(a: Moments, b: Moments) -> float:
    """`frechet_distance` of sets whose moments are known, without shrinkage."""
    squared = (a.mean - b.mean).square().sum() + _bures(a.covariance, b.covariance)
    return max(float(squared), 0.0)


def _bures(a: Tensor, b: Tensor) -> Tensor:
    """tr(A + B) - 2 tr((A^1/2 B A^1/2)^1/2)."""
    values, vectors = torch.linalg.eigh(a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ b @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    return a.trace() + b.trace() - 2 * cross


def ledoit_wolf_share(features: Tensor, dimension: int | None = None) -> float:
    """Share rho of the scaled identity in the shrunk covariance (Ledoit and Wolf 2004), from 0 to 1.

    S* = (1 - rho) S + rho (tr S / D) I, with rho estimated from `features` (N, D); `dimension` is D where these
    are coordinates in a space that holds them all.
    """
    dimension = dimension or features.shape[1]
    n = len(features)
    covariance = _covariance(features) * ((n - 1) / n)
    mean = _mean(features)
    fourth = sum(((x.double() - mean).square().sum(1).square().sum() for x in features.split(_ROWS)), torch.tensor(0.0))
    scale = covariance.trace() / dimension
    spread = covariance.square().sum() - dimension * scale**2
    # sum_i |x_i x_i^T - S|^2 = sum_i |x_i|^4 - n |S|^2, without building N matrices.
    noise = (fourth - n * covariance.square().sum()) / n**2
    return float((noise / spread).clamp(0, 1)) if spread > 0 else 1.0


def _fit(x: Tensor, shrinkage: Shrinkage, dimension: int) -> _Gaussian:
    covariance = _covariance(x)
    if shrinkage == "none":
        return _Gaussian(covariance, 0.0)
    share = ledoit_wolf_share(x, dimension)
    scale = share * float(covariance.trace()) / dimension
    return _Gaussian((1 - share) * covariance + scale * torch.eye(len(covariance), dtype=torch.float64), scale)


def _mean(x: Tensor) -> Tensor:
    return torch.stack([rows.double().sum(0) for rows in x.split(_ROWS)]).sum(0) / len(x)


def _covariance(x: Tensor) -> Tensor:
    """Unbiased sample covariance (D, D) of (N, D), some rows at a time: N float64 copies would not fit."""
    mean = _mean(x)
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for rows in x.split(_ROWS):
        centred = rows.double() - mean
        total += centred.T @ centred
    return total / (len(x) - 1)


class Discrepancy(NamedTuple):
    """A squared kernel discrepancy, and what it is without each volume of the first (N,) and the second set (M,)."""

    value: float
    without_a: Tensor
    without_b: Tensor

    def estimate(self, level: float = 0.95) -> Estimate:
        """The value with its normal interval, by the jackknife (leave one out) variance of a two-sample U-statistic."""
        variance = sum(
            ((len(x) - 1) * x.var(correction=0) for x in (self.without_a, self.without_b)), torch.tensor(0.0)
        )
        half_width = math.sqrt(2) * float(torch.erfinv(torch.tensor(level, dtype=torch.float64)) * variance.sqrt())
        n = min(len(self.without_a), len(self.without_b))
        return Estimate(self.value, self.value - half_width, self.value + half_width, n)


def kid(features_a: Tensor, features_b: Tensor, *, block: int = 256) -> Discrepancy:
    """Kernel distance with k(x, y) = (x.y / D + 1)^3 (Binkowski et al. 2018): unbiased MMD^2, all pairs.

    Being unbiased, the value may be below zero. One value over all pairs has the expectation of the customary mean
    over subsets and less variance; memory does not grow with N or M.

    Args:
        features_a: (N, D), or (N, S, D): slices of one volume are not independent, so no two are compared.
        features_b: (M, D), or (M, S, D).
        block: volumes a side compared at once.

    Raises:
        UserError: N or M below 3 (leaving one out needs two more), different D, or values not finite.
    """
    _check(features_a, features_b, least=3)
    return _unbiased_mmd(features_a, features_b, lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3, block)


def mmd(features_a: Tensor, features_b: Tensor, *, bandwidth: float | None = None, block: int = 256) -> Discrepancy:
    """Squared maximum mean discrepancy with k(x, y) = exp(-|x - y|^2 / (2 s^2)) (Gretton et al. 2012), unbiased.

    Unlike the cubic kernel's it is 0 in expectation for equal distributions only, and is at most 2.

    Args:
        features_a: (N, D), or (N, S, D).
        features_b: (M, D), or (M, S, D).
        bandwidth: s; by default `median_distance` within the second set, so that distances of several sets to one
            reference share their kernel.
        block: volumes a side compared at once.

    Raises:
        UserError: as `kid`; or all features are equal, so that there is no scale.
    """
    _check(features_a, features_b, least=3)
    s = median_distance(features_b) if bandwidth is None else bandwidth
    if s <= 0:
        raise UserError("all features are equal: there is no distance to scale the kernel by", "look at the volumes")
    return _unbiased_mmd(
        features_a, features_b, lambda x, y: torch.exp(-torch.cdist(x, y).square() / (2 * s * s)), block
    )


def median_distance(features: Tensor) -> float:
    """Median distance between different items (N, D) or (N, S, D), of 2,000 evenly spread ones at most."""
    rows = features.reshape(-1, features.shape[-1])
    return float(torch.pdist(rows[:: -(-len(rows) // _MEDIAN_ROWS)].double()).median())


def _unbiased_mmd(a: Tensor, b: Tensor, kernel: Kernel, block: int) -> Discrepancy:
    """E k(a, a') + E k(b, b') - 2 E k(a, b) over pairs of different volumes."""
    a, b = (x[:, None] if x.ndim == 2 else x for x in (a, b))
    n, m = len(a), len(b)
    within_a, within_b = _kernel_sums(a, a, kernel, block)[0], _kernel_sums(b, b, kernel, block)[0]
    across_a, across_b = _kernel_sums(a, b, kernel, block)
    total_a, total_b, across = within_a.sum(), within_b.sum(), across_a.sum()

    term_a, term_b = total_a / (n * (n - 1)), total_b / (m * (m - 1))
    value = float(term_a + term_b - 2 * across / (n * m))
    without_a = (total_a - 2 * within_a) / ((n - 1) * (n - 2)) - 2 * (across - across_a) / ((n - 1) * m)
    without_b = (total_b - 2 * within_b) / ((m - 1) * (m - 2)) - 2 * (across - across_b) / (n * (m - 1))
    return Discrepancy(value, without_a + term_b, without_b + term_a)


def _kernel_sums(x: Tensor, y: Tensor, kernel: Kernel, block: int) -> tuple[Tensor, Tensor]:
    """sum_j k(x_i, y_j) of each i and sum_i of each j, i = j left out where x is y; (N, S, D) and (M, S', D)."""
    rows, columns = torch.zeros(len(x), dtype=torch.float64), torch.zeros(len(y), dtype=torch.float64)
    block = max(block // max(x.shape[1], y.shape[1]), 1)
    for i in range(0, len(x), block):
        x_i = x[i : i + block].flatten(0, 1).double()
        for j in range(0, len(y), block):
            y_j = y[j : j + block].flatten(0, 1).double()
            values = kernel(x_i, y_j).unflatten(0, (-1, x.shape[1])).unflatten(2, (-1, y.shape[1])).mean((1, 3))
            if x is y and i == j:
                values.fill_diagonal_(0)
            rows[i : i + block] += values.sum(1)
            columns[j : j + block] += values.sum(0)
    return rows, columns


def _check(a: Tensor, b: Tensor, *, least: int) -> None:
    if a.ndim not in (2, 3) or b.ndim not in (2, 3) or a.shape[-1] != b.shape[-1]:
        raise UserError(
            f"features of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared",
            "both sets need shape (N, D) or (N, S, D) with the same D: use the same extractor for both",
        )
    if min(len(a), len(b)) < least:
        raise UserError(
            f"a set distance needs at least {least} volumes on each side, got {len(a)} and {len(b)}",
            "generate or provide more volumes",
        )
    if not (a.isfinite().all() and b.isfinite().all()):
        raise UserError(_NOT_FINITE, _FIND)
