from __future__ import annotations

import math

import numpy as np
import pytest

from neuromf.errors import UserError
from neuromf.metrics.morphology import (
    chance_effect,
    compare_structures,
    correlation_agreement,
    correlation_baseline,
    dice,
    mean_absolute_effect,
)

NAMES = [f"s{i}" for i in range(6)]


def _heads(n: int, seed: int, *, coupling: float = 0.8, size: int = len(NAMES)) -> np.ndarray:
    """Volumes in ml whose correlations fall with the distance of the structures."""
    rng = np.random.default_rng(seed)
    i = np.arange(size)
    covariance = coupling ** np.abs(i[:, None] - i)
    return 20 + rng.multivariate_normal(np.zeros(size), covariance, n)


def test_a_shift_of_one_deviation_is_an_effect_of_one() -> None:
    real = _heads(400, 0)
    generated = _heads(400, 1)
    generated[:, 2] += 1
    by_name = {s.structure: s for s in compare_structures(generated, real, NAMES)}
    assert by_name["s2"].g == pytest.approx(1, abs=0.2)
    assert by_name["s2"].g_low < 1 < by_name["s2"].g_high + 0.2
    assert by_name["s2"].ks_p_holm < 1e-6
    # Two normal distributions a deviation apart: 2 Phi(1/2) - 1.
    assert by_name["s2"].ks == pytest.approx(math.erf(0.5 / math.sqrt(2)), abs=0.06)
    assert all(s.ks_p_holm > 0.01 for name, s in by_name.items() if name != "s2")


def test_volumes_are_listed_with_their_deviation_and_a_constant_structure_is_left_out() -> None:
    generated, real = _heads(5, 0), _heads(7, 1)
    generated[:, 3] = real[:, 3] = 0.0
    found = compare_structures(generated, real, NAMES)
    assert [s.structure for s in found] == ["s0", "s1", "s2", "s4", "s5"]
    assert found[0].generated_ml == pytest.approx(generated[:, 0].mean())
    assert found[0].real_sd_ml == pytest.approx(real[:, 0].std(ddof=1))


def test_a_structure_that_is_lost_in_all_generated_heads_is_a_large_effect() -> None:
    generated, real = _heads(20, 0), _heads(20, 1)
    generated[:, 1] = 0.0
    lost = compare_structures(generated, real, NAMES)[1]
    assert lost.g < -10
    assert lost.ks == 1


def test_the_mean_effect_of_equal_distributions_is_what_chance_gives() -> None:
    values = [mean_absolute_effect(_heads(40, 2 * s), _heads(60, 2 * s + 1), resamples=2).value for s in range(60)]
    error = np.std(values) / math.sqrt(60)
    assert np.mean(values) == pytest.approx(chance_effect(40, 60), abs=4 * error)


def test_the_mean_effect_is_that_of_the_structures() -> None:
    generated, real = _heads(15, 0) + np.linspace(-2, 2, 6), _heads(25, 1)
    listed = compare_structures(generated, real, NAMES)
    estimate = mean_absolute_effect(generated, real)
    assert estimate.value == pytest.approx(np.mean([abs(s.g) for s in listed]), rel=1e-9)
    assert estimate.low < estimate.value < estimate.high


def test_correlations_agree_where_structures_go_together_alike() -> None:
    real = _heads(300, 0)
    same = correlation_agreement(_heads(300, 1), real)
    assert same.low > 0.9
    assert same.low < same.value < same.high
    rng = np.random.default_rng(2)
    shuffled = np.stack([rng.permutation(column) for column in _heads(300, 1).T], axis=1)
    assert correlation_agreement(shuffled, real).value < 0.7


def test_agreement_is_the_correlation_of_the_two_triangles_whatever_the_units() -> None:
    generated, real = _heads(12, 0), _heads(14, 1)
    upper = np.triu_indices(len(NAMES), 1)
    expected = np.corrcoef(np.corrcoef(generated.T)[upper], np.corrcoef(real.T)[upper])[0, 1]
    assert correlation_agreement(generated, real).value == pytest.approx(expected)
    scaled = generated * np.array([1, 10, 0.1, 5, 3, 2]) + 7
    assert correlation_agreement(scaled, real).value == pytest.approx(expected)
    assert correlation_agreement(generated, generated).value == pytest.approx(1)


def test_the_interval_of_agreement_covers_what_the_populations_have() -> None:
    order = [0, 2, 1, 3, 5, 4]
    upper = np.triu_indices(len(NAMES), 1)
    population = 0.8 ** np.abs(np.subtract.outer(np.arange(6), np.arange(6)))
    true = np.corrcoef(population[upper], population[np.ix_(order, order)][upper])[0, 1]
    found = [correlation_agreement(_heads(150, 2 * s)[:, order], _heads(150, 2 * s + 1)) for s in range(15)]
    assert 0.3 < true < 0.95
    assert sum(estimate.low <= true <= estimate.high for estimate in found) >= 12


def test_the_baseline_is_high_for_structures_that_go_together_and_absent_for_few_heads() -> None:
    ceiling = correlation_baseline(_heads(200, 0))
    assert ceiling is not None
    assert ceiling.value > 0.9
    assert ceiling.n == 100
    assert correlation_baseline(_heads(15, 0)) is None


@pytest.mark.parametrize("case", ["few heads", "few structures", "NaN", "other structures"])
def test_what_cannot_be_compared_is_refused(case: str) -> None:
    generated, real = _heads(10, 0), _heads(10, 1)
    if case == "few heads":
        generated = generated[:2]
    elif case == "few structures":
        generated, real = generated[:, :3], real[:, :3]
    elif case == "NaN":
        generated[0, 0] = math.nan
    else:
        generated = generated[:, :5]
    with pytest.raises(UserError):
        correlation_agreement(generated, real)


def test_dice_of_maps_that_overlap_by_half() -> None:
    a, b = np.zeros((2, 4, 4, 4), dtype=np.uint8)
    a[:2], b[1:3] = 1, 1
    a[3, 3, 3] = b[3, 3, 3] = 2
    b[3, 0, 0] = 3
    assert dice(a, b, (1, 2, 3, 4)) == {1: 0.5, 2: 1.0, 3: 0.0}
