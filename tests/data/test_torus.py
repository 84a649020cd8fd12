from __future__ import annotations

import math

import pytest
import torch
from torch.utils.data import DataLoader

from neuromf.data.torus import BlobTorus, FlatTorus, TorusDataset, torus_split, uniform_angles

MANIFOLDS = [FlatTorus(), BlobTorus(8)]


@pytest.fixture
def angles():
    return uniform_angles(40, torch.Generator().manual_seed(0))


def test_flat_points_lie_on_the_unit_sphere_and_on_two_circles(angles):
    points = FlatTorus().points(angles)
    assert points.shape == (40, 4, 1, 1, 1)
    pairs = points.reshape(40, 2, 2).norm(dim=2)
    assert torch.allclose(pairs, torch.full_like(pairs, 1 / math.sqrt(2)))
    assert torch.allclose(points.flatten(1).norm(dim=1), torch.ones(40))


def test_flat_points_are_the_formula():
    a, b = 0.3, -2.0
    expected = [math.cos(a), math.sin(a), math.cos(b), math.sin(b)]
    found = FlatTorus().points(torch.tensor([[a, b]])).flatten() * math.sqrt(2)
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("manifold", MANIFOLDS)
def test_points_close_up_after_a_turn(manifold, angles):
    whole_turns = torch.tensor([[2 * math.pi, -2 * math.pi]])
    assert torch.allclose(manifold.points(angles), manifold.points(angles + whole_turns), atol=1e-5)


def test_the_first_channel_s_blob_has_the_centre_width_and_amplitude_of_its_angles():
    a, b, size = 1.1, 2.3, 64
    blob = BlobTorus(size).points(torch.tensor([[a, b]], dtype=torch.float64))[0, 0]
    cells = (torch.arange(size, dtype=torch.float64) + 0.5) * 8 / size
    i, j, k = (blob.sum(dim=[axis for axis in range(3) if axis != n]) for n in range(3))
    centre = [float((profile * cells).sum() / profile.sum()) for profile in (i, j, k)]
    assert centre == pytest.approx([3 + math.cos(a), 4 + math.sin(a), 4 + math.sin(b)], abs=0.04)
    width = float(((cells - centre[2]) ** 2 * k).sum() / k.sum()) ** 0.5
    assert width == pytest.approx(1.5 + 0.3 * math.cos(b), abs=0.05)
    assert float(blob.max()) == pytest.approx(1 + 0.3 * math.cos(a), abs=0.01)


def test_channels_are_the_same_blob_at_other_combinations_of_the_angles(angles):
    torus = BlobTorus(8)
    a, b = angles.unbind(1)
    volumes = torus.points(angles)
    for channel, (p, q) in enumerate([(a, b), (b, a), (a + b, b), (a - b, a)]):
        alone = torus.points(torch.stack([p, q], dim=1))[:, 0]
        assert torch.allclose(volumes[:, channel], alone, atol=1e-5)


def test_every_channel_alone_tells_angles_apart():
    steps = torch.arange(12) * (2 * math.pi / 12)
    grid = torch.cartesian_prod(steps, steps)
    volumes = BlobTorus(8).points(grid).flatten(2)
    for channel in range(4):
        distances = torch.cdist(volumes[:, channel], volumes[:, channel]) + 1e9 * torch.eye(len(grid))
        assert distances.min() > 0.1


def test_a_finer_grid_shows_the_same_blobs(angles):
    fine = torch.nn.functional.avg_pool3d(BlobTorus(32).points(angles), 2)
    assert (fine - BlobTorus(16).points(angles)).abs().max() < 0.06


def test_angles_are_uniform_and_of_their_seed():
    angles = uniform_angles(20_000, torch.Generator().manual_seed(3))
    assert torch.equal(angles, uniform_angles(20_000, torch.Generator().manual_seed(3)))
    counts = torch.histc(angles, bins=10, min=0, max=2 * math.pi)
    assert (counts / 4_000 - 1).abs().max() < 0.06


@pytest.mark.parametrize("manifold", MANIFOLDS)
def test_a_split_is_whitened_with_its_training_part(manifold):
    split = torus_split(manifold, 500, 100, seed=1)
    train, unseen = (torch.stack([part[i] for i in range(len(part))]) for part in (split.train, split.held_back))
    axes = (0, 2, 3, 4)
    assert train.mean(axes).abs().max() < 1e-5
    assert torch.allclose(train.std(axes, correction=0), torch.ones(4), atol=1e-5)
    real = manifold.points(split.held_back.angles)
    assert torch.allclose(split.statistics.unwhiten(unseen), real, atol=1e-5)
    assert len(unseen) == 100
    assert split.statistics.files == 500


def test_seeds_give_other_data_and_the_same_seed_the_same():
    first, again, other = (torus_split(FlatTorus(), 50, 10, seed).train.angles for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_set_too_large_for_memory_makes_the_same_items_when_asked(angles):
    held = torus_split(BlobTorus(8), 40, 5, seed=0).train
    made = TorusDataset(held.manifold, held.angles, held.statistics, ram_limit_bytes=0)
    assert torch.equal(torch.stack(made.__getitems__([3, 0])), torch.stack([held[3], held[0]]))


def test_a_loader_s_batches_are_those_of_single_look_ups():
    split = torus_split(FlatTorus(), 30, 5, seed=0).train
    (batch,) = DataLoader(split, batch_sampler=[[4, 2, 9]])
    assert torch.equal(batch, torch.stack([split[4], split[2], split[9]]))
