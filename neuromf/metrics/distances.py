"""Distances between two sets of feature vectors; features in, numbers out, float64 throughout.

Which features they are is the caller's to say: "FID" is the Frechet distance of Inception features only.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from neuromf.errors import UserError
from neuromf.metrics.statistics import Estimate

Shrinkage = Literal["none", "ledoit-wolf"]


def frechet_distance(features_a: Tensor, features_b: Tensor, *, shrinkage: Shrinkage = "none") -> float:
    """Frechet distance of two Gaussians fitted to the features (Heusel et al. 2017, equation 6).

    d^2 = |m_a - m_b|^2 + tr(S_a + S_b) - 2 tr((S_a^1/2 S_b S_a^1/2)^1/2), by eigenvalues of symmetric
    matrices, so nothing complex can appear. It is biased upwards by an amount that grows with D / N:
    compare only distances of equal N, and set a real-against-real distance of the same N beside each.

    Args:
        features_a: (N, D).
        features_b: (M, D).
        shrinkage: `none` for the unbiased sample covariances (rank N - 1 at most); `ledoit-wolf` for
            shrunk ones, to be labelled "shrunk" wherever the number is shown.

    Raises:
        UserError: N or M below 2, different D, or values that are not finite.
    """
    features_a, features_b = _checked(features_a, features_b, least=2)
    mean_term = (features_a.mean(0) - features_b.mean(0)).square().sum()
    covariance_a, covariance_b = (_covariance(x, shrinkage) for x in (features_a, features_b))
    values, vectors = torch.linalg.eigh(covariance_a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root_a @ covariance_b @ root_a
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    squared = mean_term + covariance_a.trace() + covariance_b.trace() - 2 * cross
    return max(float(squared), 0.0)


def ledoit_wolf_share(features: Tensor) -> float:
    """Share rho of the scaled identity in the shrunk covariance (Ledoit and Wolf 2004), from 0 to 1.

    S* = (1 - rho) S + rho (tr S / D) I, with rho estimated from `features` (N, D).
    """
    x = features.double() - features.double().mean(0)
    n, dimension = x.shape
    covariance = x.T @ x / n
    scale = covariance.trace() / dimension
    spread = covariance.square().sum() - dimension * scale**2
    # sum_i |x_i x_i^T - S|^2 = sum_i |x_i|^4 - n |S|^2, without building N matrices.
    noise = (x.square().sum(1).square().sum() - n * covariance.square().sum()) / n**2
    return float((noise / spread).clamp(0, 1)) if spread > 0 else 1.0


def _covariance(features: Tensor, shrinkage: Shrinkage) -> Tensor:
    covariance = torch.cov(features.T).reshape(features.shape[1], features.shape[1])
    if shrinkage == "none":
        return covariance
    share = ledoit_wolf_share(features)
    identity = torch.eye(len(covariance), dtype=torch.float64)
    return (1 - share) * covariance + share * covariance.trace() / len(covariance) * identity


def kid(features_a: Tensor, features_b: Tensor, *, level: float = 0.95, block: int = 1024) -> Estimate:
    """Kernel distance with k(x, y) = (x.y / D + 1)^3 (Binkowski et al. 2018): unbiased MMD^2, all pairs.

    The interval is the normal one with the jackknife (leave one out) variance of the two-sample
    U-statistic. Being unbiased, the value may be below zero. One value over all pairs has the expectation
    of the customary mean over subsets and less variance; memory stays at block x max(N, M).

    Args:
        features_a: (N, D).
        features_b: (M, D).

    Raises:
        UserError: N or M below 3 (leaving one out needs two more), different D, or values not finite.
    """
    a, b = _checked(features_a, features_b, least=3)
    n, m = len(a), len(b)
    within_a, within_b = _row_sums(a, a, block), _row_sums(b, b, block)
    within_a, within_b = within_a - _kernel_diagonal(a), within_b - _kernel_diagonal(b)
    across_a, across_b = _row_sums(a, b, block), _row_sums(b, a, block)
    total_a, total_b, across = within_a.sum(), within_b.sum(), across_a.sum()

    term_a, term_b = total_a / (n * (n - 1)), total_b / (m * (m - 1))
    value = term_a + term_b - 2 * across / (n * m)
    without_a = (total_a - 2 * within_a) / ((n - 1) * (n - 2)) - 2 * (across - across_a) / ((n - 1) * m)
    without_b = (total_b - 2 * within_b) / ((m - 1) * (m - 2)) - 2 * (across - across_b) / (n * (m - 1))
    variance = (n - 1) * without_a.var(correction=0) + (m - 1) * without_b.var(correction=0)
    half_width = math.sqrt(2) * float(torch.erfinv(torch.tensor(level, dtype=torch.float64)) * variance.sqrt())
    return Estimate(float(value), float(value) - half_width, float(value) + half_width, min(n, m))


def _row_sums(x: Tensor, y: Tensor, block: int) -> Tensor:
    """sum_j k(x_i, y_j) for each i, `block` rows at a time."""
    return torch.cat([_cubic(rows @ y.T, x.shape[1]).sum(1) for rows in x.split(block)])


def _kernel_diagonal(x: Tensor) -> Tensor:
    return _cubic(x.square().sum(1), x.shape[1])


def _cubic(inner: Tensor, dimension: int) -> Tensor:
    return (inner / dimension + 1) ** 3


def _checked(a: Tensor, b: Tensor, *, least: int) -> tuple[Tensor, Tensor]:
    a, b = a.double(), b.double()
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise UserError(
            f"features of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared",
            "both sets need shape (N, D) with the same D: use the same extractor for both",
        )
    if min(len(a), len(b)) < least:
        raise UserError(
            f"a set distance needs at least {least} volumes on each side, got {len(a)} and {len(b)}",
            "generate or provide more volumes",
        )
    if not (a.isfinite().all() and b.isfinite().all()):
        raise UserError("the features hold NaN or Inf", "find the volume that is not finite and leave it out")
    return a, b
