from __future__ import annotations

import pytest
import torch
from torch import nn

from neuromf.config import TrainingConfig
from neuromf.training.optim import build_optimizer, learning_rate


def config(**settings) -> TrainingConfig:
    return TrainingConfig(**{"updates": 100, "lr": 1e-3, "lr_final": 1e-5, "warmup_steps": 10, **settings})


def test_only_trainable_parameters_are_optimised_with_the_configured_moments():
    network = nn.Linear(3, 2)
    network.bias.requires_grad_(False)
    optimizer = build_optimizer(network, config(betas=(0.8, 0.9), weight_decay=0.2))
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [id(p) for p in group["params"]] == [id(network.weight)]
    assert (tuple(group["betas"]), group["weight_decay"], group["lr"]) == ((0.8, 0.9), 0.2, 1e-3)


def test_warm_up_rises_on_a_line_from_zero():
    rates = [learning_rate(k, 100, config()) for k in range(11)]
    assert rates == pytest.approx([1e-4 * k for k in range(11)])


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_without_warm_up_the_first_update_has_the_base_rate(schedule):
    assert learning_rate(0, 100, config(schedule=schedule, warmup_steps=0)) == pytest.approx(1e-3)


@pytest.mark.parametrize(("schedule", "last"), [("constant", 1e-3), ("cosine", 1e-5), ("linear", 1e-5)])
def test_the_schedule_ends_with_the_last_update(schedule, last):
    assert learning_rate(99, 100, config(schedule=schedule)) == pytest.approx(last)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_halfway_down_the_rate_is_the_mean_of_both_ends(schedule):
    rate = learning_rate(60, 111, config(schedule=schedule, updates=111))
    assert rate == pytest.approx((1e-3 + 1e-5) / 2)


def test_a_warm_up_longer_than_the_run_still_only_rises():
    rates = [learning_rate(k, 5, config(updates=5)) for k in range(5)]
    assert rates == sorted(rates)
    assert rates[-1] < 1e-3
