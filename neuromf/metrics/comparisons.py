"""Whether runs of different settings differ: Welch's t, analysis of variance, Tukey's HSD, Holm; with effect sizes.

Each value is one independent run (a seed), not one volume; but `paired`, `unpaired` and `discrepancy_difference` tell
two sets of volumes apart. A test says how surprising the differences were if there were none; the interval beside it
says which differences the data leave possible.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, stats

from neuromf.errors import UserError
from neuromf.metrics.statistics import Estimate

Groups = Mapping[str, Sequence[float]]


class Welch(NamedTuple):
    """Two levels compared: `difference` is the first's mean less the second's, with its interval.

    `g` is Hedges' standardised difference with its interval.
    """

    t: float
    df: float
    p: float
    difference: float
    low: float
    high: float
    g: float
    g_low: float
    g_high: float


class Anova(NamedTuple):
    """All levels at once; `eta_squared` is the share of the variance they explain, with its interval."""

    f: float
    df_between: int
    df_within: int
    p: float
    eta_squared: float
    low: float
    high: float


class Difference(NamedTuple):
    """The first less the second, with its interval and the two-sided p of no difference; `test` says how."""

    difference: float
    low: float
    high: float
    p: float
    test: str


class Pair(NamedTuple):
    """Two of several levels: `first` less `second`, its simultaneous interval, and p adjusted for all pairs."""

    first: str
    second: str
    difference: float
    low: float
    high: float
    p: float


def mean_interval(values: Sequence[float], level: float = 0.95) -> Estimate:
    """The mean with Student's interval; a single value has none (NaN).

    Raises:
        UserError: no values.
    """
    if not len(values):
        raise UserError("a mean needs at least one value")
    mean, n = float(np.mean(values)), len(values)
    half = math.nan if n < 2 else float(stats.sem(values) * stats.t.ppf((1 + level) / 2, n - 1))
    return Estimate(mean, mean - half, mean + half, n)


def welch(groups: Groups, level: float = 0.95) -> Welch:
    """Welch's t-test (1947) of two independent levels whose variances may differ, two-sided.

    g = J (mean_a - mean_b) / s_pooled with J the exact correction of Hedges (1981); its interval is by inverting the
    noncentral t distribution (Steiger and Fouladi 1997).

    Raises:
        UserError: not two levels, fewer than two values in one, or no variance at all.
    """
    _check(groups)
    if len(groups) > 2:
        raise UserError(f"Welch's t compares two levels, and there are {len(groups)}", "use the analysis of variance")
    a, b = groups.values()
    test = stats.ttest_ind(a, b, equal_var=False)
    interval = test.confidence_interval(level)
    n, m = len(a), len(b)
    df, scale = n + m - 2, math.sqrt(1 / n + 1 / m)
    pooled = math.sqrt(((n - 1) * np.var(a, ddof=1) + (m - 1) * np.var(b, ddof=1)) / df)
    correction = math.exp(math.lgamma(df / 2) - math.lgamma((df - 1) / 2)) / math.sqrt(df / 2) if df > 1 else 1.0
    difference = float(np.mean(a) - np.mean(b))
    t = difference / (pooled * scale)
    low, high = (
        correction * scale * _noncentrality(partial(_nct, t, df), p, start=t)
        for p in ((1 + level) / 2, (1 - level) / 2)
    )
    g = correction * difference / pooled
    return Welch(
        float(test.statistic), float(test.df), float(test.pvalue), difference, float(interval.low),
        float(interval.high), g, low, high,
    )  # fmt: skip


def anova(groups: Groups, blocks: Mapping[str, Sequence[Any]] | None = None, level: float = 0.95) -> Anova:
    """Analysis of variance of one factor; with `blocks` (seeds, say) their additive effect is taken out first.

    eta^2 = SS_between / (SS_between + SS_within); its interval is by inverting the noncentral F (Steiger 2004).

    Args:
        groups: values by level.
        blocks: for each level, what each of its values was run with; every level has each block equally often.
        level: of the interval.

    Raises:
        UserError: fewer than two levels, a level with fewer than two values, no variance, or unequal blocks.
    """
    between, within, df_between, df_within = _sums_of_squares(groups, blocks)
    f = (between / df_between) / (within / df_within)
    n = df_between + df_within + 1

    def share(p: float) -> float:
        if stats.f.cdf(f, df_between, df_within) < p:
            return 0.0
        nc = _noncentrality(partial(_ncf, f, df_between, df_within), p, start=0.0)
        return nc / (nc + n)

    low, high = share((1 + level) / 2), share((1 - level) / 2)
    p = float(stats.f.sf(f, df_between, df_within))
    return Anova(f, df_between, df_within, p, between / (between + within), low, high)


def tukey(groups: Groups, blocks: Mapping[str, Sequence[Any]] | None = None, level: float = 0.95) -> list[Pair]:
    """Tukey's honestly significant differences of all pairs of levels (Kramer's form where their sizes differ).

    p = P(q_{k, df} > |d| / sqrt(MS / 2 (1/n_i + 1/n_j))), q the studentized range of k levels, MS the residual mean
    square of `anova` on df degrees of freedom.

    Raises:
        UserError: as `anova`.
    """
    _, within, _, df = _sums_of_squares(groups, blocks)
    k = len(groups)
    critical = float(stats.studentized_range.ppf(level, k, df))
    pairs = []
    for (first, a), (second, b) in combinations(groups.items(), 2):
        error = math.sqrt(within / df / 2 * (1 / len(a) + 1 / len(b)))
        d = float(np.mean(a) - np.mean(b))
        p = float(stats.studentized_range.sf(abs(d) / error, k, df))
        pairs.append(Pair(first, second, d, d - critical * error, d + critical * error, min(max(p, 0.0), 1.0)))
    return pairs


def paired(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Difference:
    """Two sets of values of the same items, in the same order: Student's t of their differences.

    Raises:
        UserError: sets of different lengths, or of fewer than two items.
    """
    if len(a) != len(b) or len(a) < 2:
        raise UserError(f"a paired comparison of {len(a)} and {len(b)} values", "two or more items, each in both sets")
    found = mean_interval((np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).tolist(), level)
    half = found.high - found.value
    if half > 0:
        t = found.value / half * float(stats.t.ppf((1 + level) / 2, len(a) - 1))
        p = float(2 * stats.t.sf(abs(t), len(a) - 1))
    else:
        p = 1.0 if found.value == 0 else 0.0
    return Difference(found.value, found.low, found.high, p, "paired t")


def unpaired(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Difference:
    """Two sets of values of different items: Welch's t.

    Raises:
        UserError: fewer than two values in a set, or no variance at all.
    """
    _check({"first": a, "second": b})
    test = stats.ttest_ind(a, b, equal_var=False)
    interval = test.confidence_interval(level)
    difference = float(np.mean(a) - np.mean(b))
    return Difference(difference, float(interval.low), float(interval.high), float(test.pvalue), "Welch's t")


def discrepancy_difference(
    values: tuple[float, float],
    generated: tuple[Sequence[float], Sequence[float]],
    real: tuple[Sequence[float], Sequence[float]],
    level: float = 0.95,
) -> Difference:
    """Two kernel distances of different generated sets to one real set: are they equal?

    The normal interval of the difference, by the jackknife: Var = (n-1) s^2 over leaving out each volume of the first
    generated set, the same of the second, and (m-1) s^2 of the difference itself over leaving out each real volume,
    which both distances share.

    Args:
        values: the two distances.
        generated: of each, its values without each of its generated volumes.
        real: of each, its values without each real volume, in the same order.
        level: of the interval.

    Raises:
        UserError: different numbers of real volumes.
    """
    a, b = (np.asarray(x, dtype=float) for x in real)
    if len(a) != len(b):
        raise UserError(f"distances to {len(a)} and to {len(b)} real volumes are not of one real set")
    parts = [np.asarray(x, dtype=float) for x in (*generated, a - b)]
    error = math.sqrt(sum((len(x) - 1) * float(x.var()) for x in parts))
    difference = values[0] - values[1]
    half = float(stats.norm.ppf((1 + level) / 2)) * error
    p = float(2 * stats.norm.sf(abs(difference) / error)) if error > 0 else float(difference == 0)
    return Difference(difference, difference - half, difference + half, p, "jackknife z, one real set")


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979) of a family of tests, in the order given.

    Example:
        >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]
    """
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        worst = max(worst, min((len(p_values) - rank) * p_values[i], 1.0))
        adjusted[i] = worst
    return adjusted


def _sums_of_squares(groups: Groups, blocks: Mapping[str, Sequence[Any]] | None) -> tuple[float, float, int, int]:
    """(SS between levels, SS of the residuals, their degrees of freedom)."""
    _check(groups)
    values = np.concatenate([np.asarray(values, dtype=float) for values in groups.values()])
    grand, n, k = values.mean(), len(values), len(groups)
    between = float(sum(len(v) * (np.mean(v) - grand) ** 2 for v in groups.values()))
    within = float(sum(((np.asarray(v) - np.mean(v)) ** 2).sum() for v in groups.values()))
    df = n - k
    if blocks is not None:
        members = _blocks(groups, blocks)
        within -= float(sum(len(v) * (np.mean(v) - grand) ** 2 for v in members.values()))
        df -= len(members) - 1
    if df < 1 or within <= 1e-12 * between:
        raise UserError("nothing is left to judge the differences by", "repeat each level with more seeds")
    return between, within, k - 1, df


def _blocks(groups: Groups, blocks: Mapping[str, Sequence[Any]]) -> dict[Any, list[float]]:
    """Values by block, in a balanced design; only there are the two sums of squares independent."""
    counts = {tuple(sorted(map(str, blocks[name]))) for name in groups}
    if len(counts) > 1:
        raise UserError("the levels were not all run with the same blocks", "compare without blocks")
    members: dict[Any, list[float]] = {}
    for name, values in groups.items():
        for block, value in zip(blocks[name], values, strict=True):
            members.setdefault(block, []).append(value)
    if len({len(values) for values in members.values()}) > 1:
        raise UserError("the levels do not have each block equally often", "compare without blocks")
    return members


def _check(groups: Groups) -> None:
    if len(groups) < 2:
        raise UserError("a comparison needs at least two levels")
    short = [name for name, values in groups.items() if len(values) < 2]
    if short:
        raise UserError(
            f"one run says nothing about chance: {', '.join(short)}", "repeat each level with two or more seeds"
        )
    if all(np.ptp(values) == 0 for values in groups.values()):
        raise UserError("the runs of each level are all equal, so that chance cannot be judged")


def _ncf(f: float, dfn: int, dfd: int, nc: float) -> float:
    return float(stats.ncf.cdf(f, dfn, dfd, nc) if nc > 0 else stats.f.cdf(f, dfn, dfd))


def _nct(t: float, df: int, nc: float) -> float:
    value = float(stats.nct.cdf(t, df, nc))
    return float(nc < t) if math.isnan(value) else value  # scipy's series fails far from t, where the tail is empty


def _noncentrality(cdf: Callable[[float], float], p: float, *, start: float) -> float:
    """The noncentrality at which a cdf, which falls with it, is p; sought around `start`."""
    low, high, step = start, start + 1.0, 1.0
    while cdf(low) < p:
        low, step = low - step, 2 * step
    step = 1.0
    while cdf(high) > p:
        high, step = high + step, 2 * step
    return float(optimize.brentq(lambda nc: cdf(nc) - p, low, high))
