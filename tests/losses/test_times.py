from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuromf.losses.times import clamp_times, equal_mask, limit_gap, logit_normal, mix_uniform, pair

ORDERS = ("sort-then-mask", "mask-then-sort", "min")


def draws(size: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    first, second, chooser = torch.rand(3, size, generator=generator)
    return first, second, chooser < 0.5


@pytest.mark.parametrize("order", ORDERS)
def test_r_never_exceeds_t_and_equals_it_where_asked(order):
    first, second, equal = draws(500)
    r, t = pair(first, second, equal, order)
    assert (r <= t).all()
    assert torch.equal(r[equal], t[equal])
    assert (r < t)[~equal].sum() > (100 if order == "min" else 200)


def test_the_orders_differ_in_the_t_of_samples_with_r_equal_t():
    first, second, equal = torch.tensor([0.2]), torch.tensor([0.8]), torch.tensor([True])
    assert pair(first, second, equal, "sort-then-mask")[1].item() == pytest.approx(0.8)
    assert pair(first, second, equal, "mask-then-sort")[1].item() == pytest.approx(0.2)
    assert pair(first, second, equal, "min")[1].item() == pytest.approx(0.2)


def test_without_equal_samples_min_keeps_the_drawn_t_and_the_others_the_larger():
    first, second, never = torch.tensor([0.2]), torch.tensor([0.8]), torch.tensor([False])
    for order, expected in (("sort-then-mask", (0.2, 0.8)), ("mask-then-sort", (0.2, 0.8)), ("min", (0.2, 0.2))):
        r, t = pair(first, second, never, order)
        assert (r.item(), t.item()) == pytest.approx(expected)


def test_logit_normal_is_the_sigmoid_of_a_scaled_normal():
    assert logit_normal(torch.tensor(0.4), -0.4, 1.0).item() == pytest.approx(0.5)
    assert logit_normal(torch.tensor(-1.0), 0.8, 0.8).item() == pytest.approx(0.5)


def test_a_share_of_the_times_becomes_uniform():
    times, uniform = torch.zeros(4), torch.full((4,), 0.7)
    chooser = torch.tensor([0.05, 0.0999, 0.1, 0.9])
    assert mix_uniform(times, uniform, chooser, 0.1).tolist() == pytest.approx([0.7, 0.7, 0.0, 0.0])
    assert mix_uniform(times, uniform, chooser, 0.0).eq(0).all()


def test_times_are_lifted_to_the_clamp_without_breaking_the_pairs():
    r = torch.tensor([0.01, 0.005, 0.0, 0.3])
    t = torch.tensor([0.01, 0.02, 0.04, 0.9])
    low, high = clamp_times(r, t, 0.05)
    assert high.tolist() == pytest.approx([0.05, 0.05, 0.05, 0.9])
    assert low.tolist() == pytest.approx([0.05, 0.005, 0.0, 0.3])
    assert all(torch.equal(a, b) for a, b in zip(clamp_times(r, t, 0.0), (r, t), strict=True))


def test_a_limited_gap_raises_r_alone_and_only_where_it_is_wider():
    r, t = torch.tensor([0.0, 0.5, 0.6, 0.3]), torch.tensor([1.0, 0.7, 0.6, 0.6])
    assert limit_gap(r, t, 0.25).tolist() == pytest.approx([0.75, 0.5, 0.6, 0.35])
    assert torch.equal(limit_gap(r, t, 1.0), r)


@settings(max_examples=50, deadline=None)
@given(batch=st.integers(1, 40), share=st.floats(0, 1), rounding=st.floats(0, 0.999), seed=st.integers(0, 99))
def test_the_number_of_equal_samples_is_the_share_rounded_up_or_down(batch, share, rounding, seed):
    order = torch.rand(batch, generator=torch.Generator().manual_seed(seed))
    moving = batch - int(equal_mask(batch, share, torch.tensor(rounding, dtype=torch.float64), order).sum())
    assert abs(moving - batch * (1 - share)) < 1 + 1e-9


@pytest.mark.parametrize(("batch", "share"), [(1, 0.75), (3, 0.5), (10, 0.9), (16, 0.75)])
def test_the_share_is_exact_in_expectation(batch, share):
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    order = torch.arange(batch, dtype=torch.float64)
    equal = sum(int(equal_mask(batch, share, rounding, order).sum()) for rounding in grid)
    assert equal / 1000 == pytest.approx(batch * share, abs=1.5e-3)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (1.0, 8)])
def test_the_extreme_shares_take_none_or_all(share, expected):
    for rounding in (0.0, 0.5, 1 - 2**-24):
        assert equal_mask(8, share, torch.tensor(rounding), torch.rand(8)).sum() == expected


def test_the_places_of_the_equal_samples_are_random_and_not_the_first_ones():
    generator = torch.Generator().manual_seed(0)
    masks = [equal_mask(8, 0.5, torch.tensor(0.0), torch.rand(8, generator=generator)) for _ in range(2000)]
    frequency = torch.stack(masks).float().mean(0)
    assert (frequency - 0.5).abs().max() < 0.05
