from __future__ import annotations

import pytest
import torch
from scipy import stats

from neuromf.losses.guidance import (
    guided_velocity,
    inside,
    interval_from_uniform,
    mixed_velocity,
    scale_from_uniform,
)

SHAPE = (4, 4, 2, 3, 2)  # B == C


@pytest.fixture
def velocities():
    """v, v_cond, v_null."""
    return torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def grid(size: int = 10_001) -> torch.Tensor:
    """The midpoints of equal parts of [0, 1]: draws without chance."""
    return (torch.arange(size, dtype=torch.float64) + 0.5) / size


# --- targets -------------------------------------------------------------------------------------------------


def test_meanflows_mixture_without_weights_is_the_velocity_itself(velocities):
    v, cond, null = velocities
    assert torch.equal(mixed_velocity(v, null, cond, 1.0, 0.0), v)
    torch.testing.assert_close(mixed_velocity(v, null, cond, 0.0, 0.0), null)
    torch.testing.assert_close(mixed_velocity(v, null, cond, 0.0, 1.0), cond)


@pytest.mark.parametrize(("omega", "kappa"), [(1.8, 0.5), (2.0, 0.0), (1.0, 0.5)])
def test_meanflows_mixture_has_the_published_effective_scale(velocities, omega, kappa):
    """Where the network has learned it, v_cond = v_g = w v + (1 - w) v_null with w = omega / (1 - kappa)."""
    v, _, null = velocities
    effective = omega / (1 - kappa)
    learned = effective * v + (1 - effective) * null
    torch.testing.assert_close(mixed_velocity(v, null, learned, omega, kappa), learned)


def test_each_sample_is_guided_at_its_own_scale(velocities):
    v, cond, null = velocities
    omega = torch.tensor([1.0, 2.0, 4.0, 1e12], dtype=torch.float64)
    found = guided_velocity(v, cond, null, omega)
    assert torch.equal(found[0], v[0])
    for i, strength in enumerate((0.0, 0.5, 0.75, 1.0)):
        torch.testing.assert_close(found[i], v[i] + strength * (cond[i] - null[i]))


def test_a_network_that_has_learned_the_guided_target_extrapolates_from_no_class(velocities):
    """Where v_cond is the target itself, v_cond = omega v + (1 - omega) v_null: the usual guidance."""
    v, _, null = velocities
    omega = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    scale = omega.reshape(4, 1, 1, 1, 1)
    learned = scale * v + (1 - scale) * null
    torch.testing.assert_close(guided_velocity(v, learned, null, omega), learned)


def test_guidance_acts_inside_its_interval_ends_included():
    interval = torch.tensor([0.2, 0.7]).expand(5, 2)
    assert inside(torch.tensor([0.1, 0.2, 0.5, 0.7, 0.8]), interval).tolist() == [False, True, True, True, False]
    each = torch.tensor([[0.0, 1.0], [0.6, 1.0]])
    assert inside(torch.tensor([0.5, 0.5]), each).tolist() == [True, False]


# --- what is drawn -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.0, 3.0])
def test_scales_have_the_density_that_falls_with_the_power_beta(beta):
    """Against the distribution function of omega^-beta on [1, 8], integrated by hand."""
    found = scale_from_uniform(grid(), 8.0, beta)
    assert found.min() >= 1
    assert found.max() <= 8
    if beta == 1:
        share = found.log() / torch.tensor(8.0, dtype=torch.float64).log()
    else:
        share = (found ** (1 - beta) - 1) / (8 ** (1 - beta) - 1)
    torch.testing.assert_close(share, grid())


def test_scales_depend_on_beta_without_a_jump_at_one():
    near = scale_from_uniform(grid(11), 8.0, 1 + 1e-7)
    torch.testing.assert_close(near, scale_from_uniform(grid(11), 8.0, 1.0), rtol=1e-6, atol=0)


def test_scales_of_uniform_draws_are_log_uniform():
    draws = torch.rand(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = scale_from_uniform(draws, 8.0, 1.0)
    assert stats.kstest(found.numpy(), stats.loguniform(1, 8).cdf).pvalue > 0.05


def test_intervals_hold_the_middle_and_are_whole_where_the_times_are_equal():
    low, high = torch.rand(2, 1000, generator=torch.Generator().manual_seed(0))
    equal = torch.arange(1000) % 2 == 0
    found = interval_from_uniform(low, high, equal)
    assert torch.equal(found[equal], torch.tensor([[0.0, 1.0]]).expand(500, 2))
    start, end = found[~equal].unbind(1)
    assert torch.equal(start, 0.5 * low[~equal])
    assert torch.equal(end, 0.5 + 0.5 * high[~equal])
    assert (start <= 0.5).all()
    assert (end >= 0.5).all()
