from __future__ import annotations

from itertools import islice

import pytest
import torch
from scipy import stats

from neuromf.config import GuidanceConfig, ObjectiveConfig, TimesConfig
from neuromf.training.draws import (
    draw_conditions,
    draw_corners,
    draw_noise,
    draw_times,
    largest_gap,
    numbered_order,
)

CPU = torch.device("cpu")
SHAPE = (2, 3, 3, 3)
U = ObjectiveConfig(prediction="u")


def times_of(size: int, micro_batch: int = 0, objective: ObjectiveConfig = U, **settings):
    return draw_times(0, "train", micro_batch, size, TimesConfig(**settings), objective)


# --- noise -------------------------------------------------------------------------------------------------------


def test_the_noise_of_a_sample_depends_on_its_number_alone():
    whole = draw_noise(0, "train", range(8), SHAPE, CPU)
    halves = [draw_noise(0, "train", numbers, SHAPE, CPU) for numbers in (range(4), range(4, 8))]
    assert torch.equal(whole, torch.cat(halves))
    assert not torch.equal(whole, draw_noise(0, "validation", range(8), SHAPE, CPU))
    assert not torch.equal(whole, draw_noise(1, "train", range(8), SHAPE, CPU))


@pytest.mark.parametrize("shape", [SHAPE, (4, 1, 1, 1), (2, 12, 16, 12), (3,)])
def test_the_noise_of_a_number_is_the_same_whichever_others_are_asked_for(shape):
    """Small samples share a generator in blocks; no block boundary shows."""
    size = 2000 if len(shape) < 4 or shape[1] == 1 else 160
    whole = draw_noise(0, "train", range(size), shape, CPU)
    for numbers in ([0], [size - 1], range(70, 90), [5, size - 3, 76, 75, 74, 5], range(3, size, size // 7)):
        assert torch.equal(draw_noise(0, "train", numbers, shape, CPU), whole[list(numbers)])
    assert len(torch.unique(whole)) > 0.99 * whole.numel()


def test_the_noise_is_standard_normal_and_independent_between_samples():
    noise = draw_noise(0, "train", range(3000), (4, 1, 1, 1), CPU).reshape(3000, 4).double()
    assert stats.kstest(noise.flatten().numpy(), stats.norm.cdf).pvalue > 0.05
    assert torch.corrcoef(torch.cat([noise[:-1], noise[1:]], dim=1).T).fill_diagonal_(0).abs().max() < 0.08


# --- the order of the data -----------------------------------------------------------------------------------


def test_every_pass_shows_each_sample_once_in_a_new_order():
    indices = [index for _, index in islice(numbered_order(0, 5, 0), 15)]
    passes = [indices[i : i + 5] for i in (0, 5, 10)]
    assert all(sorted(p) == list(range(5)) for p in passes)
    assert len({tuple(p) for p in passes}) > 1


@pytest.mark.parametrize("start", [0, 3, 5, 12])
def test_the_order_can_be_entered_anywhere(start):
    whole = list(islice(numbered_order(0, 5, 0), 20))
    assert list(islice(numbered_order(0, 5, start), 8)) == whole[start : start + 8]
    assert [number for number, _ in whole] == list(range(20))


# --- the distribution of the times -----------------------------------------------------------------------------


def both(r: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The draws before pairing: sorting only reorders them."""
    return torch.cat([r, t]).double()


@pytest.mark.gate("P3-T7")
@pytest.mark.parametrize(("mean", "std"), [(-0.4, 1.0), (0.8, 0.8)])
def test_the_marginal_draws_are_logit_normal(mean, std):
    draws = both(*times_of(5000, mean=mean, std=std, data_proportion=0))
    assert stats.kstest(torch.logit(draws).numpy(), stats.norm(mean, std).cdf).pvalue > 0.05


@pytest.mark.gate("P3-T7")
def test_the_marginal_draws_are_uniform_on_request():
    draws = both(*times_of(5000, distribution="uniform", data_proportion=0))
    assert stats.kstest(draws.numpy(), stats.uniform.cdf).pvalue > 0.05


def test_a_share_of_uniform_draws_makes_the_mixture():
    draws = both(*times_of(5000, mean=0.8, std=0.8, uniform_share=0.3, data_proportion=0))
    mixture = lambda x: 0.7 * stats.norm.cdf(stats.logistic.ppf(x), 0.8, 0.8) + 0.3 * x
    assert stats.kstest(draws.numpy(), mixture).pvalue > 0.05


def test_r_may_have_parameters_of_its_own():
    r, t = times_of(10_000, mean=3.0, std=0.1, r_mean=-3.0, r_std=0.1, data_proportion=0)
    assert torch.logit(t.double()).mean().item() == pytest.approx(3, abs=0.01)
    assert torch.logit(r.double()).mean().item() == pytest.approx(-3, abs=0.01)


@pytest.mark.parametrize(("size", "share"), [(1, 0.75), (3, 0.5), (16, 0.75)])
def test_the_share_of_equal_times_is_exact_in_expectation(size, share):
    counts = []
    for micro_batch in range(600):
        r, t = times_of(size, micro_batch, data_proportion=share)
        counts.append(int((r == t).sum()))
        assert abs(counts[-1] - size * share) < 1
    assert sum(counts) / len(counts) == pytest.approx(size * share, abs=0.08)


def test_rectified_flow_has_only_equal_times():
    r, t = times_of(64, objective=ObjectiveConfig(name="rectflow", prediction="u"), data_proportion=0)
    assert torch.equal(r, t)


def test_a_share_of_the_moving_samples_trains_the_one_step_pair():
    r, t = times_of(8000, data_proportion=0.5, one_step_share=0.25)
    whole = (r == 0) & (t == 1)
    assert int((r == t).sum()) == 4000
    assert whole.sum().item() / 4000 == pytest.approx(0.25, abs=0.02)


def test_an_x_prediction_never_sees_times_below_its_clamp():
    settings = {"mean": -3.0, "data_proportion": 0.5}
    r, t = times_of(2000, objective=ObjectiveConfig(prediction="x", t_min=0.05), **settings)
    free_r, free_t = times_of(2000, **settings)
    assert (free_t < 0.05).any()
    assert t.min().item() == pytest.approx(0.05)
    assert (r <= t).all()
    assert torch.equal(r == t, free_r == free_t)


def test_pmf_sees_small_times_for_it_clips_its_target_too():
    settings = {"mean": -3.0, "data_proportion": 0.5}
    r, t = times_of(2000, objective=ObjectiveConfig(name="pmf", t_min=0.05), **settings)
    free = times_of(2000, **settings)
    assert torch.equal(r, free[0])
    assert torch.equal(t, free[1])


# --- the curriculum of gaps ----------------------------------------------------------------------------------


CURRICULUM = TimesConfig(distribution="uniform", data_proportion=0.25, gap_start=0.1, gap_curriculum=0.5)


@pytest.mark.parametrize(("progress", "gap"), [(0, 0.1), (0.25, 0.55), (0.5, 1), (0.75, 1), (1, 1)])
def test_the_largest_gap_grows_to_one(progress, gap):
    assert largest_gap(progress, CURRICULUM) == pytest.approx(gap)
    assert largest_gap(progress, TimesConfig()) == 1
    r, t = draw_times(0, "train", 0, 4000, CURRICULUM, U, progress)
    assert (t - r).max().item() == pytest.approx(gap, abs=0.03)
    assert (t - r).max() <= gap + 1e-6


def test_the_curriculum_moves_r_alone():
    free = draw_times(0, "train", 0, 4000, CURRICULUM, U, 1.0)
    r, t = draw_times(0, "train", 0, 4000, CURRICULUM, U, 0.0)
    assert torch.equal(t, free[1])
    assert torch.equal(r == t, free[0] == free[1])
    narrow = free[1] - free[0] <= 0.1
    assert torch.equal(r[narrow], free[0][narrow])


# --- conditions ----------------------------------------------------------------------------------------------


def conditions_of(size: int, micro_batch: int = 0, equal: torch.Tensor | None = None, **settings):
    label = torch.arange(size) % 3
    equal = torch.zeros(size, dtype=torch.bool) if equal is None else equal
    return draw_conditions(0, "train", micro_batch, label, equal, GuidanceConfig(**settings))


def test_labels_are_dropped_independently_of_each_other_of_the_class_and_of_equal_times():
    counts = torch.zeros(2, 2, 3)  # dropped, r = t, class
    for micro_batch in range(300):
        r, t = times_of(64, micro_batch, data_proportion=0.75)
        condition, dropped = conditions_of(64, micro_batch, r == t, label_drop=0.3)
        for at in zip(dropped.int(), (r == t).int(), condition.label, strict=True):
            counts[at] += 1
    assert counts[1].sum().item() / counts.sum().item() == pytest.approx(0.3, abs=0.01)
    for table in (counts.sum(2), counts.sum(1)):
        assert stats.chi2_contingency(table.numpy()).pvalue > 0.01


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (1.0, 100)])
def test_the_extreme_shares_drop_no_label_or_all(share, expected):
    condition, dropped = conditions_of(100, label_drop=share)
    assert dropped.sum() == expected
    assert torch.equal(condition.label, torch.arange(100) % 3)  # the dropped ones are still known


def test_without_guidance_no_scale_is_drawn():
    condition, _ = conditions_of(4)
    assert condition.omega is None
    assert condition.interval is None


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_scales_follow_their_distribution(beta):
    condition, _ = conditions_of(4000, enabled=True, omega_max=6.0, omega_beta=beta)
    law = stats.loguniform(1, 6).cdf if beta == 1 else lambda omega: (1 - 1 / omega) / (1 - 1 / 6)
    assert stats.kstest(condition.omega.double().numpy(), law).pvalue > 0.05


def test_intervals_are_drawn_around_the_middle_and_whole_where_the_times_are_equal():
    equal = torch.arange(4000) % 2 == 0
    condition, _ = conditions_of(4000, equal=equal, enabled=True)
    assert torch.equal(condition.interval[equal], torch.tensor([[0.0, 1.0]]).expand(2000, 2))
    low, high = condition.interval[~equal].double().unbind(1)
    assert stats.kstest(low.numpy(), stats.uniform(0, 0.5).cdf).pvalue > 0.01
    assert stats.kstest(high.numpy(), stats.uniform(0.5, 0.5).cdf).pvalue > 0.01
    assert (
        abs(torch.corrcoef(torch.stack([low, high, condition.omega[~equal].double()])).fill_diagonal_(0)).max() < 0.07
    )


def test_corners_lie_in_the_unit_cube_and_differ_between_micro_batches():
    corners = draw_corners(0, "train", 0, 3000)
    assert corners.shape == (3000, 3)
    assert corners.min() >= 0
    assert corners.max() < 1
    assert stats.kstest(corners.flatten().double().numpy(), stats.uniform.cdf).pvalue > 0.05
    assert not torch.equal(corners, draw_corners(0, "train", 1, 3000))
