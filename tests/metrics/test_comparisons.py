"""Statistics of runs, against numbers worked by hand and those that R's own pages print."""

from __future__ import annotations

import math
import statistics

import pytest
from scipy import stats

from neuromf.errors import UserError
from neuromf.metrics.comparisons import (
    anova,
    discrepancy_difference,
    holm,
    mean_interval,
    paired,
    tukey,
    unpaired,
    welch,
)

# R's data set `warpbreaks` (Tippett 1950): breaks of yarn by tension (L, M, H), nine looms each of wool A, then B.
BREAKS = {
    "L": [26, 30, 54, 25, 70, 52, 51, 26, 67, 27, 14, 29, 19, 29, 31, 41, 20, 44],
    "M": [18, 21, 29, 17, 12, 18, 35, 30, 36, 42, 26, 19, 16, 39, 28, 21, 39, 29],
    "H": [36, 21, 24, 18, 10, 43, 28, 15, 26, 20, 21, 24, 17, 13, 15, 15, 16, 28],
}
WOOL = {tension: ["A"] * 9 + ["B"] * 9 for tension in BREAKS}
# R's data set `PlantGrowth` (Dobson 1983).
PLANTS = {
    "ctrl": [4.17, 5.58, 5.18, 6.11, 4.50, 4.61, 5.17, 4.53, 5.33, 5.14],
    "trt1": [4.81, 4.17, 4.41, 3.59, 5.87, 3.83, 6.03, 4.89, 4.32, 4.69],
    "trt2": [6.31, 5.12, 5.54, 5.50, 5.37, 5.29, 4.92, 6.15, 5.80, 5.26],
}


def test_tukey_gives_the_numbers_of_the_example_in_r_s_help_page() -> None:
    # R, ?TukeyHSD: fm1 <- aov(breaks ~ wool + tension, data = warpbreaks); TukeyHSD(fm1, "tension", ordered = TRUE)
    published = {
        ("M", "H"): (4.722222, -4.6311985, 14.07564, 0.4474210),
        ("L", "H"): (14.722222, 5.3688015, 24.07564, 0.0011218),
        ("L", "M"): (10.000000, 0.6465793, 19.35342, 0.0336262),
    }
    found = {(p.first, p.second): (p.difference, p.low, p.high, p.p) for p in tukey(BREAKS, blocks=WOOL)}
    assert found.keys() == {("L", "M"), ("L", "H"), ("M", "H")}
    for pair, numbers in published.items():
        assert found[pair] == pytest.approx(numbers, rel=2e-6, abs=6e-8)


def test_tukey_without_blocks_is_r_s_and_scipy_s() -> None:
    # R: TukeyHSD(aov(weight ~ group, PlantGrowth)); trt2-trt1 0.865, 0.1737839 to 1.5562161, p adj 0.0120064.
    published = {
        ("ctrl", "trt1"): (0.371, -0.3202161, 1.0622161, 0.3908711),
        ("ctrl", "trt2"): (-0.494, -1.1852161, 0.1972161, 0.1979960),
        ("trt1", "trt2"): (-0.865, -1.5562161, -0.1737839, 0.0120064),
    }
    for pair in tukey(PLANTS):
        numbers = (pair.difference, pair.low, pair.high, pair.p)
        assert numbers == pytest.approx(published[pair.first, pair.second], rel=1e-5, abs=6e-8)
    reference = stats.tukey_hsd(*BREAKS.values())
    assert [p.p for p in tukey(BREAKS)] == pytest.approx([reference.pvalue[i] for i in ((0, 1), (0, 2), (1, 2))])


def test_tukey_takes_levels_of_different_size() -> None:
    groups = {"a": [1.0, 2.0, 4.0], "b": [3.0, 5.0], "c": [9.0, 7.5, 8.0, 6.0]}
    reference = stats.tukey_hsd(*groups.values())
    interval = reference.confidence_interval(0.9)
    for pair, at in zip(tukey(groups, level=0.9), ((0, 1), (0, 2), (1, 2)), strict=True):
        numbers = (reference.statistic[at], interval.low[at], interval.high[at], reference.pvalue[at])
        assert (pair.difference, pair.low, pair.high, pair.p) == pytest.approx(numbers)


def test_analysis_of_variance_by_hand() -> None:
    # Means 2, 3, 7 of three each, grand mean 4: SS between 3 (4 + 1 + 9) = 42, within 3 x 2 = 6; F = 21 / 1.
    found = anova({"a": [1, 2, 3], "b": [2, 3, 4], "c": [6, 7, 8]})
    assert found[:3] == (pytest.approx(21), 2, 6)
    assert found.eta_squared == pytest.approx(42 / 48)
    assert found.p == pytest.approx((1 + 2 * 21 / 6) ** -3)  # of F with 2 and m degrees: (1 + 2 F / m)^(-m / 2)
    # With the rows as blocks: means 3, 4, 5, so 3 (1 + 0 + 1) = 6 leaves the residuals, all of it.
    with pytest.raises(UserError, match="nothing is left"):
        anova({"a": [1, 2, 3], "b": [2, 3, 4], "c": [6, 7, 8]}, blocks={key: [0, 1, 2] for key in "abc"})


def test_analysis_of_variance_is_r_s_with_and_without_blocks() -> None:
    # R: summary(aov(weight ~ group, PlantGrowth)): F 4.846 on 2 and 27, p 0.0159;
    # summary(aov(breaks ~ wool + tension, warpbreaks)) in ?TukeyHSD: tension F 7.537 on 2 and 50, p 0.00138.
    plants, tension = anova(PLANTS), anova(BREAKS, blocks=WOOL)
    assert (round(plants.f, 3), plants.df_between, plants.df_within, round(plants.p, 4)) == (4.846, 2, 27, 0.0159)
    assert (round(tension.f, 3), tension.df_between, tension.df_within, round(tension.p, 5)) == (7.537, 2, 50, 0.00138)


def test_the_interval_of_eta_squared_holds_the_effects_under_which_f_is_not_surprising() -> None:
    found = anova(PLANTS)
    assert 0 < found.low < found.eta_squared < found.high < 1
    for share, tail in ((found.low, 0.975), (found.high, 0.025)):
        noncentrality = 30 * share / (1 - share)
        assert stats.ncf.cdf(found.f, 2, 27, noncentrality) == pytest.approx(tail)
    nothing = anova({"a": [1.0, 3.0, 2.0], "b": [2.1, 1.0, 3.0]})
    assert nothing.low == 0


def test_welch_by_hand() -> None:
    # Means 5 and 2, variances 4 and 1, three each: t = 3 / sqrt(5/3); df = (5/3)^2 / ((4/3)^2 / 2 + (1/3)^2 / 2).
    found = welch({"a": [3, 5, 7], "b": [1, 2, 3]})
    assert found.t == pytest.approx(3 / math.sqrt(5 / 3))
    assert found.df == pytest.approx((25 / 9) / (17 / 18))
    half = stats.t.ppf(0.975, found.df) * math.sqrt(5 / 3)
    assert (found.difference, found.low, found.high) == pytest.approx((3, 3 - half, 3 + half))
    # Pooled variance 2.5; J(4) = Gamma(2) / (sqrt(2) Gamma(1.5)) = 0.797885.
    assert found.g == pytest.approx(0.7978846 * 3 / math.sqrt(2.5))


def test_welch_is_r_s_on_its_sleep_data() -> None:
    # R, ?t.test: t.test(extra ~ group, data = sleep): t = -1.8608, df = 17.776, p = 0.07939, -3.3654832 to 0.2054832.
    one = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    two = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = welch({"1": one, "2": two})
    assert (round(found.t, 4), round(found.df, 3), round(found.p, 5)) == (-1.8608, 17.776, 0.07939)
    assert (found.low, found.high) == pytest.approx((-3.3654832, 0.2054832), abs=1e-7)


def test_the_interval_of_g_turns_with_its_sign_and_holds_it() -> None:
    a, b = [3.0, 5.0, 7.0], [1.0, 2.0, 3.0]
    one, other = welch({"a": a, "b": b}), welch({"b": b, "a": a})
    assert one.g_low < one.g < one.g_high
    assert (other.g_low, other.g_high) == pytest.approx((-one.g_high, -one.g_low))
    far = welch({"a": [1000.0, 1000.1], "b": [0.0, 0.1]})  # a large effect of few runs still has bounds
    assert 0 < far.g_low < far.g < far.g_high < math.inf


def test_holm_by_hand() -> None:
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1: 0.02, 0.03, 0.06, and 0.04 raised to 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.7, 0.6]) == [1, 1]
    assert holm([]) == []


def test_a_mean_of_one_run_has_no_interval() -> None:
    assert mean_interval([1.0, 3.0]).high == pytest.approx(
        2 + 12.7062047
    )  # t of one degree of freedom, sd / sqrt 2 = 1
    assert mean_interval([2.0]).value == 2
    assert math.isnan(mean_interval([2.0]).low)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"a": [1.0, 2.0]}, "two levels"),
        ({"a": [1.0, 2.0], "b": [1.0]}, "one run says nothing about chance: b"),
        ({"a": [1.0, 1.0], "b": [2.0, 2.0]}, "all equal"),
    ],
)
def test_what_cannot_be_compared_is_said(groups: dict[str, list[float]], message: str) -> None:
    for test in (anova, tukey, welch):
        with pytest.raises(UserError, match=message):
            test(groups)


def test_unequal_blocks_are_refused() -> None:
    with pytest.raises(UserError, match="same blocks"):
        anova({"a": [1.0, 2.0], "b": [1.0, 4.0]}, blocks={"a": [0, 1], "b": [0, 2]})


def test_paired_differences_are_those_of_the_example_in_r_s_help_page() -> None:
    # R, ?t.test: t.test(Pair(extra.1, extra.2) ~ 1) of `sleep` (Student 1908)
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = paired(first, second)
    assert found.difference == pytest.approx(-1.58)
    assert (found.low, found.high) == pytest.approx((-2.4598858, -0.7001142), abs=1e-6)
    assert found.p == pytest.approx(0.002833, abs=1e-6)
    # and t.test(extra ~ group, data = sleep)
    apart = unpaired(first, second)
    assert apart.p == pytest.approx(0.07939, abs=1e-5)
    assert (apart.low, apart.high) == pytest.approx((-3.3654832, 0.2054832), abs=1e-6)


def test_equal_values_differ_by_nothing_and_other_lengths_are_refused() -> None:
    assert paired([1.0, 2.0, 4.0], [1.0, 2.0, 4.0])[:4] == (0, 0, 0, 1)
    assert paired([2.0, 3.0], [1.0, 2.0]).p == 0
    with pytest.raises(UserError, match="paired comparison of 2 and 3"):
        paired([1.0, 2.0], [1.0, 2.0, 3.0])


def test_what_distances_share_with_one_real_set_does_not_widen_their_difference() -> None:
    generated, real = [0.1, 0.2, 0.15, 0.12], [0.5, 0.1, 0.9, 0.3]
    found = discrepancy_difference((1.0, 0.4), (generated, generated), (real, real))
    variance = 2 * 3 * statistics.pvariance(generated)
    assert found.high - found.difference == pytest.approx(1.959964 * math.sqrt(variance), rel=1e-6)
    apart = discrepancy_difference((1.0, 0.4), (generated, generated), (real, real[::-1]))
    assert apart.high - apart.low > found.high - found.low
    with pytest.raises(UserError, match="not of one real set"):
        discrepancy_difference((1.0, 0.4), (generated, generated), (real, real[:3]))
