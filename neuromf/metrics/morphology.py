"""Whether generated heads have the anatomy of real ones: volumes of structures, their spread, and how they go together.

Volumes in ml in, numbers out: (N, S) of N generated heads and (M, S) of M real ones, S structures.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from neuromf.errors import UserError
from neuromf.metrics.comparisons import holm, welch
from neuromf.metrics.statistics import Estimate

LEAST = 3
"""Volumes of a side that a comparison needs."""
_LEAST_CORRELATED = 4  # leaving one out leaves three, the fewest with a correlation that is not 1
_SPLITS = 20


class Structure(NamedTuple):
    """One structure in both sets.

    Attributes:
        g: Hedges' standardised difference, generated less real, with its 95 % interval.
        ks: the largest distance of the two cumulative distributions (Kolmogorov-Smirnov); `ks_p` of no difference,
            `ks_p_holm` adjusted for all structures.
    """

    structure: str
    generated_ml: float
    generated_sd_ml: float
    real_ml: float
    real_sd_ml: float
    g: float
    g_low: float
    g_high: float
    ks: float
    ks_p: float
    ks_p_holm: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return self._asdict()


def compare_structures(generated: np.ndarray, real: np.ndarray, names: Sequence[str]) -> list[Structure]:
    """Each structure's volume in both sets; one that is the same in all volumes is left out.

    Args:
        generated: (N, S) in ml.
        real: (M, S).
        names: of the structures.

    Raises:
        UserError: fewer than 3 volumes of a side, or nothing varies.
    """
    _check(generated, real, LEAST)
    kept = [s for s in range(len(names)) if np.ptp(generated[:, s]) > 0 or np.ptp(real[:, s]) > 0]
    if not kept:
        raise UserError("no structure's volume varies", "look at the segmentations")
    effects = [welch({"generated": generated[:, s].tolist(), "real": real[:, s].tolist()}) for s in kept]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # where ties forbid the exact p, SciPy takes the asymptotic one
        tests = [stats.ks_2samp(generated[:, s], real[:, s]) for s in kept]
    adjusted = holm([float(test.pvalue) for test in tests])
    return [
        Structure(
            names[s],
            float(generated[:, s].mean()),
            float(generated[:, s].std(ddof=1)),
            float(real[:, s].mean()),
            float(real[:, s].std(ddof=1)),
            effect.g,
            effect.g_low,
            effect.g_high,
            float(test.statistic),
            float(test.pvalue),
            p,
        )
        for s, effect, test, p in zip(kept, effects, tests, adjusted, strict=True)
    ]


def mean_absolute_effect(generated: np.ndarray, real: np.ndarray, *, seed: int = 0, resamples: int = 1000) -> Estimate:
    """Mean over structures of |g|, with a percentile bootstrap over volumes; g as in `Structure`.

    It is above 0 by chance alone: two sets of one distribution have sqrt(2 / pi) sqrt(1/N + 1/M) on average.

    Raises:
        UserError: fewer than 3 volumes of a side.
    """
    _check(generated, real, LEAST)
    rng = np.random.default_rng(seed)
    kept = (np.ptp(generated, axis=0) > 0) | (np.ptp(real, axis=0) > 0)
    a, b = generated[:, kept], real[:, kept]
    draws = [_mean_g(_resampled(a, rng), _resampled(b, rng)) for _ in range(resamples)]
    low, high = np.nanpercentile(draws, [2.5, 97.5]).tolist()
    return Estimate(_mean_g(a, b), low, high, min(len(a), len(b)))


def chance_effect(n: int, m: int) -> float:
    """What `mean_absolute_effect` is on average where both sets are of one distribution."""
    return math.sqrt(2 / math.pi * (1 / n + 1 / m))


def correlation_agreement(generated: np.ndarray, real: np.ndarray) -> Estimate:
    """Pearson r of the S (S - 1) / 2 correlations between structures, as they are in the generated and the real set.

    r = corr(offdiag corr(V_generated), offdiag corr(V_real)) over the upper triangles, V the volumes (N, S). The
    interval is normal in Fisher's z = atanh r, with the jackknife (leave one volume out) variance of both sides: a
    bootstrap would be off-centre, since resampling blurs both matrices and lowers r. A structure that is the same in
    all volumes of a side has no correlation and is left out.

    Raises:
        UserError: fewer than 4 volumes of a side, or of 4 structures that vary.
    """
    _check(generated, real, _LEAST_CORRELATED)
    kept = (np.ptp(generated, axis=0) > 0) & (np.ptp(real, axis=0) > 0)
    if kept.sum() < 4:
        raise UserError(
            f"correlations of {int(kept.sum())} structures that vary say nothing: at least 4 are needed",
            "use a segmentation of more structures (meshnet-18, synthseg)",
        )
    generated, real = generated[:, kept], real[:, kept]
    a, b = _correlations(generated), _correlations(real)
    z = _fisher(a, b)
    without_a = np.array([_fisher(x, b) for x in _without_each(generated)])
    without_b = np.array([_fisher(a, x) for x in _without_each(real)])
    variance = sum((len(x) - 1) / len(x) * np.square(x - x.mean()).sum() for x in (without_a, without_b))
    half = stats.norm.ppf(0.975) * math.sqrt(float(variance))
    return Estimate(math.tanh(z), math.tanh(z - half), math.tanh(z + half), min(len(generated), len(real)))


def correlation_baseline(real: np.ndarray, *, seed: int = 0) -> Estimate | None:
    """`correlation_agreement` of random halves of the real set: its mean and spread over 20 splits.

    What a perfect model would reach with as many volumes; None where halves are too small.
    """
    half = len(real) // 2
    kept = np.ptp(real, axis=0) > 0
    if half < 2 * _LEAST_CORRELATED or kept.sum() < 4:
        return None
    values = []
    for split in range(_SPLITS):
        order = np.random.default_rng([seed, split]).permutation(len(real))
        halves = [_correlations(real[part][:, kept]) for part in (order[:half], order[half : 2 * half])]
        values.append(math.tanh(_fisher(*halves)))
    low, high = np.percentile(values, [2.5, 97.5]).tolist()
    return Estimate(float(np.mean(values)), low, high, half)


def dice(found: np.ndarray, true: np.ndarray, classes: Sequence[int]) -> dict[int, float]:
    """2 |A and B| / (|A| + |B|) of each class that is in either of two label maps of one shape."""
    values = {}
    for label in classes:
        a, b = found == label, true == label
        if total := int(a.sum()) + int(b.sum()):
            values[label] = 2 * int((a & b).sum()) / total
    return values


def _resampled(volumes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return volumes[rng.integers(len(volumes), size=len(volumes))]


def _mean_g(a: np.ndarray, b: np.ndarray) -> float:
    """Mean |g| of the structures that vary on either side."""
    df = len(a) + len(b) - 2
    pooled = ((len(a) - 1) * a.var(0, ddof=1) + (len(b) - 1) * b.var(0, ddof=1)) / df
    correction = math.exp(math.lgamma(df / 2) - math.lgamma((df - 1) / 2)) / math.sqrt(df / 2)
    g = correction * np.abs(a.mean(0) - b.mean(0)) / np.sqrt(np.where(pooled > 0, pooled, np.nan))
    return float(np.nanmean(g)) if np.isfinite(g).any() else math.nan


def _correlations(volumes: np.ndarray) -> np.ndarray:
    """Upper triangle of the correlation matrix of (N, S), (S (S - 1) / 2,)."""
    matrix = np.corrcoef(volumes, rowvar=False)
    return matrix[np.triu_indices(len(matrix), 1)]


def _without_each(volumes: np.ndarray) -> list[np.ndarray]:
    """`_correlations` without each volume in turn; a structure that then is constant counts as uncorrelated."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return [np.nan_to_num(_correlations(np.delete(volumes, i, axis=0))) for i in range(len(volumes))]


def _fisher(a: np.ndarray, b: np.ndarray) -> float:
    r = float(np.corrcoef(a, b)[0, 1])
    return math.atanh(min(max(r, -1 + 1e-12), 1 - 1e-12))


def _check(generated: np.ndarray, real: np.ndarray, least: int) -> None:
    if generated.ndim != 2 or real.ndim != 2 or generated.shape[1] != real.shape[1]:
        raise UserError(f"tables of volumes of shapes {generated.shape} and {real.shape} cannot be compared")
    if min(len(generated), len(real)) < least:
        raise UserError(
            f"a comparison of anatomy needs at least {least} volumes of each side, got {len(generated)} and"
            f" {len(real)}",
            "generate or provide more volumes",
        )
    if not (np.isfinite(generated).all() and np.isfinite(real).all()):
        raise UserError("the volumes of structures hold NaN or Inf", "leave the heads out that have them")
