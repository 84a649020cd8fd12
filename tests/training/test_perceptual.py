from __future__ import annotations

import pytest
import torch

from neuromf.models.autoencoder import load_autoencoder
from neuromf.training.perceptual import DecodedCrops, crop, feature_distance


@pytest.fixture(scope="module")
def autoencoder():
    return load_autoencoder("builtin")


@pytest.fixture
def latents():
    return torch.randn(2, 8, 4, 4, 6, generator=torch.Generator().manual_seed(0))


def test_a_crop_is_the_cube_its_corner_names(latents):
    corner = torch.tensor([[0.0, 0.0, 0.0], [0.99, 0.5, 0.99]])
    found = crop(latents, corner, edge=2)
    assert torch.equal(found[0], latents[0, :, :2, :2, :2])
    assert torch.equal(found[1], latents[1, :, 2:4, 1:3, 4:6])


def test_an_edge_beyond_the_latent_takes_the_whole_axis(latents):
    assert torch.equal(crop(latents, torch.full((2, 3), 0.7), edge=6), latents)


def test_every_place_where_a_cube_fits_can_be_drawn():
    latent = torch.arange(5.0).reshape(1, 1, 5, 1, 1)
    corners = torch.linspace(0, 0.999, 50)
    found = {float(crop(latent, torch.tensor([[c, 0.0, 0.0]]), edge=2)[0, 0, 0, 0, 0]) for c in corners}
    assert found == {0.0, 1.0, 2.0, 3.0}


def test_equal_data_has_no_distance_and_more_noise_has_more(autoencoder, latents):
    distance = DecodedCrops(autoencoder, lambda z: z, edge=4)
    corner = torch.zeros(2, 3)
    noise = torch.randn_like(latents)
    found = [distance(latents + scale * noise, latents, corner) for scale in (0.0, 0.1, 0.5)]
    assert torch.equal(found[0], torch.zeros(2))
    assert (found[1] > 0).all()
    assert (found[2] > 2 * found[1]).all()


def test_the_distance_is_of_the_unwhitened_latents(autoencoder, latents):
    plain = DecodedCrops(autoencoder, lambda z: z, edge=4)
    scaled = DecodedCrops(autoencoder, lambda z: 2 * z, edge=4)
    corner, other = torch.zeros(2, 3), latents + 0.1
    torch.testing.assert_close(scaled(other / 2, latents / 2, corner), plain(other, latents, corner))


def test_gradients_reach_the_estimate_and_not_the_autoencoder(autoencoder, latents):
    x_hat = (latents + 0.3).requires_grad_()
    DecodedCrops(autoencoder, lambda z: z, edge=2)(x_hat, latents, torch.zeros(2, 3)).sum().backward()
    assert x_hat.grad is not None
    assert x_hat.grad[:, :, :2, :2, :2].any()
    assert not x_hat.grad[:, :, 2:].any()
    assert all(p.grad is None for p in autoencoder.network.parameters())


def test_a_step_down_the_distance_lowers_it(autoencoder, latents):
    distance, corner = DecodedCrops(autoencoder, lambda z: z, edge=4), torch.zeros(2, 3)
    x_hat = (latents + 0.5 * torch.randn_like(latents)).requires_grad_()
    before = distance(x_hat, latents, corner).sum()
    (gradient,) = torch.autograd.grad(before, x_hat)
    after = distance(x_hat - 0.5 * gradient / gradient.norm(), latents, corner).sum()
    assert after < before


def test_the_feature_distance_ignores_length_and_lies_between_zero_and_four():
    f = torch.randn(3, 5, 2, 2, 2)
    assert feature_distance([f, 2 * f], [3 * f, f]).abs().max() < 1e-6
    torch.testing.assert_close(feature_distance([f], [-f]), torch.full((3,), 4.0))
