from __future__ import annotations

import pytest
import torch

from neuromf.errors import UserError
from neuromf.metrics.statistics import bootstrap_interval, bootstrap_of_means, proportion_interval


def test_the_interval_depends_on_seed_and_data_only() -> None:
    values = torch.randn(40, generator=torch.Generator().manual_seed(0))
    first = bootstrap_of_means(values, seed=3)
    torch.randn(10)  # the global stream must not matter
    assert bootstrap_of_means(values, seed=3) == first
    assert bootstrap_of_means(values, seed=4) != first


def test_the_interval_of_a_mean_agrees_with_the_normal_one() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    estimate = bootstrap_of_means(values, resamples=4000)
    half_width = 1.96 * float(values.std() / 20)
    assert estimate.value == pytest.approx(float(values.mean()))
    assert estimate.high - estimate.low == pytest.approx(2 * half_width, rel=0.06)
    assert estimate.n == 400


def test_two_samples_are_resampled_independently() -> None:
    a = torch.randn(100, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    estimate = bootstrap_interval(a, a.clone(), statistic=lambda x, y: x.mean() - y.mean(), resamples=2000)
    assert estimate.value == 0
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * float(a.std()) * (2 / 100) ** 0.5, rel=0.1)


def test_weights_give_the_same_interval_as_resampling() -> None:
    a, b = (torch.rand(30, 3, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (3, 4))
    fast = bootstrap_of_means(a, b, function=lambda x, y: (x - y).abs().sum(1), resamples=4000)
    slow = bootstrap_interval(a, b, statistic=lambda x, y: (x.mean(0) - y.mean(0)).abs().sum(), resamples=1000)
    assert fast.value == pytest.approx(slow.value)
    assert fast.low == pytest.approx(slow.low, abs=0.03)
    assert fast.high == pytest.approx(slow.high, abs=0.03)


def test_an_empty_sample_is_refused() -> None:
    with pytest.raises(UserError, match="at least one"):
        bootstrap_of_means(torch.empty(0))


def test_a_proportion_of_zero_still_has_a_width() -> None:
    low_end, high_end = proportion_interval(0, 50), proportion_interval(50, 50)
    assert low_end.low == pytest.approx(0, abs=1e-12)
    assert low_end.high == pytest.approx(1.959964**2 / (50 + 1.959964**2), rel=1e-5)  # Wilson at 0
    assert high_end.low == pytest.approx(1 - low_end.high)
