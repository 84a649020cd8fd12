from __future__ import annotations

from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from scipy import stats
from torch.utils.data import Dataset

from neuromf.config import ObjectiveConfig, TimesConfig, TrainConfig
from neuromf.training import loop
from neuromf.training.draws import draw_noise, draw_times, numbered_order

CPU = torch.device("cpu")
SHAPE = (2, 3, 3, 3)
U = ObjectiveConfig(prediction="u")


def times_of(size: int, micro_batch: int = 0, objective: ObjectiveConfig = U, **settings):
    return draw_times(0, "train", micro_batch, size, TimesConfig(**settings), objective)


# --- one process or many -------------------------------------------------------------------------------------


def test_the_noise_of_a_sample_depends_on_its_number_alone():
    whole = draw_noise(0, "train", range(8), SHAPE, CPU)
    halves = [draw_noise(0, "train", numbers, SHAPE, CPU) for numbers in (range(4), range(4, 8))]
    assert torch.equal(whole, torch.cat(halves))
    assert not torch.equal(whole, draw_noise(0, "validation", range(8), SHAPE, CPU))
    assert not torch.equal(whole, draw_noise(1, "train", range(8), SHAPE, CPU))


class Numbers(Dataset):
    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full(SHAPE, float(index))


def process(rank: int, world: int, batch: int, update: int):
    """(latents, eps, r, t) of the next three updates of one of `world` processes."""
    config = TrainConfig(
        _environment=False,
        training={"updates": 9, "batch_size": batch, "accumulation": 2},
        times={"data_proportion": 0.5},
    )
    run = SimpleNamespace(
        config=config,
        update=update,
        clock=loop.Clock(11, batch * 2 * world, config),
        accelerator=SimpleNamespace(num_processes=world, process_index=rank, device=CPU),
        shape=SHAPE,
    )
    batches = loop._batches(run, Numbers())
    return [(x, *loop._draws(run, numbers)) for numbers, x in islice(batches, 6)]


@pytest.mark.parametrize("update", [0, 5])
def test_two_processes_see_together_what_one_with_twice_the_batch_sees(update):
    alone = process(0, 1, batch=6, update=update)
    together = zip(process(0, 2, batch=3, update=update), process(1, 2, batch=3, update=update), strict=True)
    for one, (first, second) in zip(alone, together, strict=True):
        for whole, a, b in zip(one, first, second, strict=True):
            assert torch.equal(whole, torch.cat([a, b]))


def test_a_resumed_run_goes_on_with_the_draws_of_the_uninterrupted_one():
    for whole, resumed in zip(process(0, 1, 3, update=0)[4:], process(0, 1, 3, update=2), strict=False):
        assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


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
