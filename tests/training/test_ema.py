from __future__ import annotations

import pytest
import torch
from torch import nn

from neuromf.errors import UserError
from neuromf.training.ema import WeightAverage, averaged_weights, half_life_decay, window_warning


def shifted(network: nn.Module, by: float) -> None:
    with torch.no_grad():
        for p in network.parameters():
            p += by


def test_the_average_starts_at_the_network_and_follows_by_its_decay():
    network = nn.Linear(3, 2)
    start = {name: p.detach().clone() for name, p in network.named_parameters()}
    average = WeightAverage(network, 0.9)
    shifted(network, 1.0)
    assert all(torch.equal(average.weights[name], start[name]) for name in start)  # a copy, not a view
    for k in range(1, 4):
        average.update(network)
        for name, value in start.items():
            torch.testing.assert_close(average.weights[name], value + (1 - 0.9**k))


def test_a_half_precision_network_is_averaged_in_float32():
    network = nn.Linear(3, 2).bfloat16()
    average = WeightAverage(network, 0.999)
    before = average.weights["weight"].clone()
    shifted(network, 1.0)
    average.update(network)
    moved = average.weights["weight"] - before
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-3), rtol=0.05, atol=0)


@pytest.mark.parametrize("fails", [False, True])
def test_the_trained_weights_come_back_bit_for_bit(fails):
    network = nn.Linear(3, 2)
    average = WeightAverage(network, 0.5)
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
    network = nn.Linear(3, 2)
    average, other = WeightAverage(network, 0.5), WeightAverage(nn.Linear(3, 2), 0.5)
    average.load(other.weights)
    assert torch.equal(average.weights["weight"], other.weights["weight"])
    with pytest.raises(UserError, match="another network"):
        average.load({"weight": other.weights["weight"]})


def test_a_half_life_halves_an_old_weight_in_that_many_images():
    decay = half_life_decay(half_life_images=1000, batch=10, update=10**6)
    assert decay ** (1000 / 10) == pytest.approx(0.5)
    assert half_life_decay(1000, 10, update=1) == pytest.approx(0.5**20)  # the ramp: a twentieth of one batch


def test_a_window_longer_than_a_tenth_of_the_run_is_warned_of():
    assert window_warning(0.999, 10_000) is None
    text = window_warning(0.9999, 50_000)
    assert text is not None
    assert "10,000" in text
    assert "50,000" in text
    advised = float(text.split("a decay of ")[1].split()[0])
    assert advised == pytest.approx(0.9998, abs=1e-4)


@pytest.mark.parametrize("updates", [100, 4_500, 30_000, 50_000, 200_000])
def test_the_advised_decay_is_not_warned_of_itself(updates):
    text = window_warning(0.999999, updates)
    assert text is not None
    assert window_warning(float(text.split("a decay of ")[1].split()[0]), updates) is None
