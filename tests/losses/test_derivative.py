from __future__ import annotations

import pytest
import torch
from torch import nn

from neuromf.losses.derivative import derivative, exact, finite_difference
from neuromf.models.unet import MaisiUNet


def polynomial(z, r, t):
    """u = z^2 t + r: du/dt = 2 z t tangent + z^2."""
    return z**2 * t[:, None] + r[:, None]


@pytest.fixture
def point():
    z, tangent = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    return z, t / 2, t, tangent


def test_the_exact_derivative_of_a_polynomial(point):
    z, r, t, tangent = point
    expected = 2 * z * t[:, None] * tangent + z**2
    torch.testing.assert_close(exact(polynomial, z, r, t, tangent), expected, rtol=1e-14, atol=1e-14)


def test_the_forward_difference_is_wrong_by_its_step(point):
    z, r, t, tangent = point
    truth = exact(polynomial, z, r, t, tangent)
    error = [(finite_difference(step)(polynomial, z, r, t, tangent) - truth).abs().max() for step in (1e-3, 1e-4)]
    assert error[0] / error[1] == pytest.approx(10, rel=0.02)


def test_each_strategy_is_found_by_its_name(point):
    assert derivative("exact") is exact
    by_name = derivative("finite-difference", 0.5)(polynomial, *point)
    assert torch.equal(by_name, finite_difference(0.5)(polynomial, *point))


@pytest.mark.parametrize("strategy", ["exact", "finite-difference"])
def test_no_graph_is_kept(point, strategy):
    z, r, t, tangent = point
    weight = torch.ones(5, dtype=torch.float64, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        du_dt = derivative(strategy)(lambda z_, r_, t_: polynomial(z_ * weight, r_, t_), z, r, t, tangent)
    assert not du_dt.requires_grad
    assert not saved


def test_autocast_is_off_inside_and_on_again_after(point):
    z, r, t, tangent = (value.float() for value in point)
    layer, seen = nn.Linear(5, 5), []

    def u(z_, r_, t_):
        seen.append(torch.is_autocast_enabled("cpu"))
        return layer(z_)

    with torch.autocast("cpu", torch.bfloat16):
        du_dt = exact(u, z, r, t, tangent)
        assert torch.is_autocast_enabled("cpu")
        assert layer(z).dtype == torch.bfloat16
    assert seen == [False]
    torch.testing.assert_close(du_dt, tangent @ layer.weight.detach().T)


def test_tf32_is_off_inside_and_as_before_after(point):
    cudnn = torch.backends.cudnn
    before, seen = cudnn.allow_tf32, []
    for allowed in (True, False):
        cudnn.allow_tf32 = allowed
        exact(lambda z, r, t: seen.append(cudnn.allow_tf32) or polynomial(z, r, t), *point)
        seen.append(cudnn.allow_tf32)
    cudnn.allow_tf32 = before
    assert seen == [False, True, False, False]


@pytest.mark.parametrize("conditioning", ["t+h", "r+t", "h"])
def test_the_unet_with_attention_matches_a_central_difference(conditioning):
    torch.manual_seed(0)
    net = MaisiUNet(
        2, channels=(8, 16), attention_levels=(False, True), head_channels=8, res_blocks=1, norm_groups=4,
        conditioning=conditioning,
    ).double()  # fmt: skip
    with torch.no_grad():
        for p in net.parameters():  # fresh networks end in a layer of zeros
            p.copy_(0.3 * torch.randn_like(p))
    z, tangent = torch.randn(2, 2, 2, 4, 4, 4, dtype=torch.float64)
    r, t = torch.tensor([0.1, 0.4], dtype=torch.float64), torch.tensor([0.5, 0.9], dtype=torch.float64)
    found = exact(net, z, r, t, tangent)
    with torch.no_grad():
        d = 1e-5
        expected = (net(z + d * tangent, r, t + d) - net(z - d * tangent, r, t - d)) / (2 * d)
        along_t = (net(z, r, t + d) - net(z, r, t - d)) / (2 * d)
    assert along_t.abs().max() > 1e-3  # time is felt
    assert (found - expected).norm() / expected.norm() < 1e-7
