from __future__ import annotations

import pytest
import torch

from neuromf.losses.path import (
    average_velocity,
    data_estimate,
    interpolate,
    per_sample,
    step,
    velocity,
    velocity_from_x,
)


@pytest.fixture
def fields():
    generator = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 4, 4, 2, 3, 2, generator=generator, dtype=torch.float64)
    return x, eps, torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=torch.float64)


def test_the_path_runs_from_data_to_noise_with_the_velocity_as_its_slope(fields):
    x, eps, t = fields
    z = interpolate(x, eps, t)
    assert torch.equal(z[0], x[0])
    assert torch.equal(z[3], eps[3])
    ahead = interpolate(x, eps, t + 1e-3)
    torch.testing.assert_close((ahead - z) / 1e-3, velocity(x, eps), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(4,), (4, 2), (4, 4), (4, 4, 4, 4), (4, 4, 2, 3, 2)])
def test_scalars_meet_the_batch_axis_whatever_the_rank(shape):
    t = torch.arange(4.0)
    scaled = per_sample(t, torch.ones(shape)) * torch.ones(shape)
    for i in range(4):
        assert (scaled[i] == i).all()


def test_points_and_volumes_agree_with_as_many_samples_as_channels(fields):
    x, eps, t = fields  # B == C == 4
    flat = interpolate(x.flatten(1), eps.flatten(1), t)
    assert torch.equal(flat, interpolate(x, eps, t).flatten(1))
    assert torch.equal(step(eps.flatten(1), flat, t / 2, t), step(eps, interpolate(x, eps, t), t / 2, t).flatten(1))


def test_the_true_data_stands_for_the_true_velocity_above_the_clamp(fields):
    x, eps, t = fields
    z, t_min = interpolate(x, eps, t), 0.05
    u = velocity_from_x(z, x, t, t_min)
    torch.testing.assert_close(u[1:], velocity(x, eps)[1:], rtol=1e-12, atol=1e-12)
    assert torch.equal(u[0], torch.zeros_like(u[0]))


def test_the_two_readings_of_an_output_are_inverse(fields):
    x, eps, t = fields
    z = interpolate(x, eps, t)
    for prediction in ("u", "x"):
        u = average_velocity(eps, z, t, prediction, 0.05)
        x_hat = data_estimate(eps, z, t, prediction)
        torch.testing.assert_close(z[1:] - per_sample(t[1:], z) * u[1:], x_hat[1:], rtol=1e-12, atol=1e-12)


def test_a_step_along_a_straight_path_lands_on_it(fields):
    x, eps, t = fields
    r = t / 2
    landed = step(velocity(x, eps), interpolate(x, eps, t), r, t)
    torch.testing.assert_close(landed, interpolate(x, eps, r), rtol=1e-12, atol=1e-12)
