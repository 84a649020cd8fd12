from __future__ import annotations

import pytest
import torch
from torch import nn

from neuromf.config import EmaConfig
from neuromf.errors import UserError
from neuromf.training.ema import (
    Constant,
    HalfLife,
    WeightAverage,
    averaged_weights,
    build_averages,
    half_life_decay,
    named_decays,
    window_warning,
)


def shifted(network: nn.Module, by: float) -> None:
    with torch.no_grad():
        for p in network.parameters():
            p += by


# --- one average -------------------------------------------------------------------------------------------------


def test_the_average_starts_at_the_network_and_follows_by_its_decay():
    network = nn.Linear(3, 2)
    start = {name: p.detach().clone() for name, p in network.named_parameters()}
    average = WeightAverage(network, Constant(0.9))
    shifted(network, 1.0)
    assert all(torch.equal(average.weights[name], start[name]) for name in start)  # a copy, not a view
    for k in range(1, 4):
        average.update(network, k, batch=1)
        for name, value in start.items():
            torch.testing.assert_close(average.weights[name], value + (1 - 0.9**k))


def test_an_average_of_every_nth_update_moves_then_and_only_then_by_that_power():
    network = nn.Linear(3, 2)
    rare, frequent = WeightAverage(network, Constant(0.9), every=4), WeightAverage(network, Constant(0.9))
    start = rare.weights["weight"].clone()
    shifted(network, 1.0)
    for update in range(1, 4):
        rare.update(network, update, batch=1)
        frequent.update(network, update, batch=1)
        assert torch.equal(rare.weights["weight"], start)
    rare.update(network, 4, batch=1)
    frequent.update(network, 4, batch=1)
    assert not torch.equal(rare.weights["weight"], start)
    torch.testing.assert_close(rare.weights, frequent.weights)  # the network stood still meanwhile


def test_a_half_life_counts_images_not_updates():
    """Past the ramp, what was there `kimg` thousand images ago counts half, however many updates those took."""
    network = nn.Linear(3, 2)
    averages = [WeightAverage(network, HalfLife(1.0)) for _ in range(2)]
    before = averages[0].weights["bias"].clone()
    shifted(network, 1.0)
    for average, batch in zip(averages, (10, 50), strict=True):
        for update in range(10_000, 10_000 + 1000 // batch):
            average.update(network, update, batch)
        torch.testing.assert_close(average.weights["bias"], before + 0.5)


@pytest.mark.parametrize(("dtype", "kept"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_an_average_is_at_least_as_precise_as_float32(dtype, kept):
    network = nn.Linear(3, 2).to(dtype)
    average = WeightAverage(network, Constant(0.999))
    before = average.weights["weight"].clone()
    shifted(network, 1.0)
    average.update(network, 1, batch=1)
    moved = average.weights["weight"] - before
    assert moved.dtype == kept
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-3), rtol=0.05, atol=0)


@pytest.mark.parametrize("decay", [Constant(0.9), HalfLife(0.1)])
def test_the_update_number_is_all_that_resuming_needs(decay):
    def walk(average: WeightAverage, first: int, last: int) -> None:
        for update in range(first, last):
            with torch.no_grad():
                network.weight.copy_(torch.randn(2, 3, generator=torch.Generator().manual_seed(update)))
            average.update(network, update, batch=8)

    network = nn.Linear(3, 2)
    whole, interrupted, resumed = (WeightAverage(network, decay, every=3) for _ in range(3))
    walk(whole, 1, 20)
    walk(interrupted, 1, 11)
    resumed.load(interrupted.weights)
    walk(resumed, 11, 20)
    assert all(torch.equal(resumed.weights[name], whole.weights[name]) for name in whole.weights)


@pytest.mark.parametrize("fails", [False, True])
def test_the_trained_weights_come_back_bit_for_bit(fails):
    network = nn.Linear(3, 2)
    average = WeightAverage(network, Constant(0.5))
    shifted(network, 1 / 3)
    trained = {name: p.detach().clone() for name, p in network.named_parameters()}
    identities = [id(p) for p in network.parameters()]
    try:
        with averaged_weights(network, average):
            assert all(torch.equal(p, average.weights[name]) for name, p in network.named_parameters())
            if fails:
                raise RuntimeError("inside")
    except RuntimeError:
        assert fails
    assert all(torch.equal(p, trained[name]) for name, p in network.named_parameters())
    assert [id(p) for p in network.parameters()] == identities  # the optimiser still holds them


def test_saved_averages_are_taken_over_and_foreign_ones_refused():
    average, other = (WeightAverage(nn.Linear(3, 2), Constant(0.5)) for _ in range(2))
    average.load(other.weights)
    assert torch.equal(average.weights["weight"], other.weights["weight"])
    with pytest.raises(UserError, match="another network"):
        average.load({"weight": other.weights["weight"]})


# --- decays ------------------------------------------------------------------------------------------------------


def test_a_half_life_halves_an_old_weight_in_that_many_images():
    decay = half_life_decay(half_life_images=1000, batch=10, update=10**6)
    assert decay ** (1000 / 10) == pytest.approx(0.5)
    assert half_life_decay(1000, 10, update=1) == pytest.approx(0.5**20)  # the ramp: a twentieth of one batch


@pytest.mark.parametrize("decay", [Constant(0.999), HalfLife(2.0)])
def test_the_window_is_the_mean_age_of_what_is_averaged(decay):
    batch, beta = 4, decay.beta(10**6, 4)
    assert decay.window(batch) == pytest.approx(1 / (1 - beta), rel=2e-3)


def test_the_averages_go_by_the_configured_names():
    config = EmaConfig(decays=(0.9995, 0.9), half_lives_kimg=(500, 0.5), every=16, select="500kimg")
    assert named_decays(config) == {
        "0.9995": Constant(0.9995),
        "0.9": Constant(0.9),
        "500kimg": HalfLife(500),
        "0.5kimg": HalfLife(0.5),
    }
    averages = build_averages(nn.Linear(3, 2), config)
    assert list(averages) == config.names
    assert config.selected in averages
    assert all(a.every == 16 and a.decay == named_decays(config)[name] for name, a in averages.items())


# --- windows too long --------------------------------------------------------------------------------------------


def test_a_window_longer_than_a_tenth_of_the_run_is_warned_of():
    assert window_warning("0.999", Constant(0.999), 10_000, 1) is None
    text = window_warning("0.9999", Constant(0.9999), 50_000, 1)
    assert text is not None
    assert "10,000" in text
    assert "50,000" in text
    advised = float(text.split("a decay of ")[1].split()[0])
    assert advised == pytest.approx(0.9998, abs=1e-4)


@pytest.mark.parametrize("updates", [100, 4_500, 30_000, 50_000, 200_000])
def test_the_advised_decay_is_not_warned_of_itself(updates):
    text = window_warning("0.999999", Constant(0.999999), updates, 1)
    assert text is not None
    advised = Constant(float(text.split("a decay of ")[1].split()[0]))
    assert window_warning("advised", advised, updates, 1) is None


@pytest.mark.parametrize(("updates", "batch"), [(100, 4), (4_500, 128), (200_000, 1024)])
def test_a_half_life_too_long_for_the_run_never_leaves_its_ramp_and_the_advised_one_does(updates, batch):
    long = HalfLife(updates * batch / 1000)
    text = window_warning("long", long, updates, batch)
    assert text is not None
    assert f"{long.window(batch):,.0f} updates" in text
    assert long.beta(updates, batch) == HalfLife(10 * long.kimg).beta(updates, batch)
    advised = HalfLife(float(text.split("; ")[1].split("kimg")[0]))
    assert window_warning("advised", advised, updates, batch) is None
    assert advised.beta(updates, batch) == pytest.approx(0.5 ** (batch / (1000 * advised.kimg)), rel=1e-3)


def test_the_half_life_of_a_run_long_enough_is_not_warned_of():
    assert window_warning("500kimg", HalfLife(500), updates=10_000, batch=1024) is None
    assert window_warning("500kimg", HalfLife(500), updates=10_000, batch=128) is not None
