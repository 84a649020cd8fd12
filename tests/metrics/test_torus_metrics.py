from __future__ import annotations

import math

import pytest
import torch

from neuromf.data.torus import BlobTorus, FlatTorus, uniform_angles
from neuromf.metrics.torus import (
    TorusReader,
    angle_errors,
    flat_angles,
    flat_distance,
    ks_uniform,
    norm_error,
    relative_residual,
)


@pytest.fixture
def angles():
    return uniform_angles(600, torch.Generator().manual_seed(0)) - math.pi


def test_points_of_the_torus_have_no_distance_and_give_their_angles_back(angles):
    points = FlatTorus().points(angles)
    assert flat_distance(points).max() < 1e-6
    assert norm_error(points).max() < 1e-6
    assert torch.allclose(flat_angles(points), angles, atol=1e-4)


def test_distance_is_the_euclidean_distance_to_the_nearest_point(angles):
    x = FlatTorus().points(angles[:20]) + 0.1 * torch.randn(20, 4, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    steps = torch.arange(360) * (2 * math.pi / 360)
    everywhere = FlatTorus().points(torch.cartesian_prod(steps, steps)).flatten(1)
    nearest = torch.cdist(x.flatten(1), everywhere).min(dim=1).values
    assert torch.allclose(flat_distance(x), nearest, atol=2e-3)


def test_norm_error_does_not_see_what_moves_along_the_sphere():
    x = torch.tensor([1.0, 0, 0, 0]).reshape(1, 4, 1, 1, 1)
    assert norm_error(x).item() == 0
    assert flat_distance(x).item() == pytest.approx(math.hypot(1 - math.sqrt(0.5), math.sqrt(0.5)))


def test_uniform_angles_pass_and_others_do_not():
    angles = uniform_angles(2_000, torch.Generator().manual_seed(5)) - math.pi
    pushed = torch.stack([angles[:, 0], angles[:, 1] + 0.3 * angles[:, 1].sin()], dim=1)
    assert min(ks_uniform(angles)) > 0.05
    even, uneven = ks_uniform(pushed)
    assert even > 0.05
    assert uneven < 1e-3


def test_volumes_are_placed_on_the_torus_by_a_reader_that_was_not_fitted_to_them():
    torus, angles = BlobTorus(8), uniform_angles(1_500, torch.Generator().manual_seed(2))
    volumes, points = torus.points(angles), FlatTorus().points(angles)
    reader = TorusReader(volumes[:1_000], points[:1_000])
    noise = 0.1 * volumes.std() * torch.randn(volumes.shape, generator=torch.Generator().manual_seed(3))
    for seen, limit in ((volumes, 0.01), (volumes + noise, 0.02)):
        read = reader(seen[1_000:])
        assert flat_distance(read).mean() < limit
        assert angle_errors(flat_angles(read), angles[1_000:]).mean() < limit


def test_a_volume_between_two_others_is_read_as_off_the_torus():
    torus, angles = BlobTorus(8), uniform_angles(1_000, torch.Generator().manual_seed(2))
    reader = TorusReader(torus.points(angles), FlatTorus().points(angles))
    apart = torch.tensor([[0.5, 1.0], [0.5, 1.0 + math.pi]])
    average = torus.points(apart).mean(0, keepdim=True)
    assert flat_distance(reader(average)).item() == pytest.approx(math.sqrt(0.5), abs=0.05)


def test_errors_of_angles_know_the_circle():
    errors = angle_errors(torch.tensor([math.pi - 0.01, 0.3, 0.0]), torch.tensor([-math.pi + 0.01, 0.1, 3 * math.pi]))
    assert errors.tolist() == pytest.approx([0.02, 0.2, math.pi], abs=1e-5)


def test_the_residual_is_zero_on_the_manifold_and_one_at_the_mean_volume():
    torus, angles = BlobTorus(8), uniform_angles(1_000, torch.Generator().manual_seed(4))
    real = torus.points(angles)
    spread = float((real - real.mean(0)).square().mean().sqrt())
    assert relative_residual(real, torus.points, angles, spread).max() < 1e-6
    mean = real.mean(0).expand_as(real)
    from_mean = relative_residual(mean, torus.points, angles, spread).square().mean().sqrt()
    assert float(from_mean) == pytest.approx(1, abs=1e-3)
