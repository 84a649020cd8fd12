from __future__ import annotations

import pytest
import torch

from neuromf.conditions import Condition
from neuromf.losses.derivative import exact
from neuromf.models.mlp import MeanFlowMLP

SHAPE = (4, 1, 1, 1)


def small(shape=SHAPE, **settings):
    torch.manual_seed(0)
    return MeanFlowMLP(shape, width=16, depth=3, **settings).double()


@pytest.fixture
def point():
    g = torch.Generator().manual_seed(1)
    z, tangent = torch.randn(2, 5, *SHAPE, generator=g, dtype=torch.float64)
    r, t = torch.sort(torch.rand(2, 5, generator=g, dtype=torch.float64), dim=0).values
    return z, r, t, tangent


def everything():
    label, omega = torch.tensor([0, 1, 2, 1, 0]), torch.tensor([1.0, 2.0, 3.0, 4.0, 8.0])
    return Condition(label, omega, torch.tensor([[0.1, 0.9]] * 5))


def test_any_shape_goes_through_flat():
    net = small((2, 3, 1, 2))
    z, times = torch.randn(4, 2, 3, 1, 2, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    assert net(z, times, times).shape == z.shape


def test_the_published_size_of_the_toy_has_its_number_of_parameters():
    count = sum(p.numel() for p in MeanFlowMLP(SHAPE).parameters())
    assert count == (4 + 2) * 256 + 256 + 3 * (256 * 256 + 256) + 256 * 4 + 4


@pytest.mark.parametrize(
    "settings",
    [{}, {"conditioning": "r+t"}, {"conditioning": "h"}, {"v_head_blocks": 1, "classes": 3, "guidance": True}],
)
def test_the_exact_derivative_matches_a_central_difference_of_the_mlp(settings, point):
    z, r, t, tangent = point
    net, told = small(**settings), everything()

    def both(z_, r_, t_):
        return torch.stack(net.heads(z_, r_, t_, told) if net.v_head else [net(z_, r_, t_, told)])

    d = 1e-5
    with torch.no_grad():
        expected = (both(z + d * tangent, r, t + d) - both(z - d * tangent, r, t - d)) / (2 * d)
        along_t = (both(z, r, t + d) - both(z, r, t - d)) / (2 * d)
    assert along_t.abs().max() > 1e-3
    assert (exact(both, z, r, t, tangent) - expected).norm() / expected.norm() < 1e-8


@torch.no_grad()
def test_conditioning_on_h_alone_feels_only_the_difference(point):
    z, r, t, _ = point
    net = small(conditioning="h")
    assert torch.equal(net(z, r, t), net(z, r - r, t - r))
    assert not torch.allclose(net(z, r, t), net(z, r, t + 0.1))


@torch.no_grad()
def test_both_pairs_of_times_tell_r_and_t(point):
    z, r, t, _ = point
    for conditioning in ("t+h", "r+t"):
        net = small(conditioning=conditioning)
        assert not torch.allclose(net(z, r, t), net(z, r + 0.1, t))
        assert not torch.allclose(net(z, r, t), net(z, r, t + 0.1))


@torch.no_grad()
def test_no_condition_means_no_class_and_no_guidance(point):
    z, r, t, _ = point
    net = small(classes=3, guidance=True)
    nothing = Condition(torch.full((5,), 3), torch.ones(5), torch.tensor([[0.0, 1.0]] * 5))
    assert torch.equal(net(z, r, t), net(z, r, t, nothing))


@torch.no_grad()
def test_class_scale_and_interval_are_felt(point):
    z, r, t, _ = point
    net, told = small(classes=3, guidance=True), everything()
    others = [
        told._replace(label=told.label + 1),
        told._replace(omega=told.omega + 1),
        told._replace(interval=told.interval / 2),
    ]
    assert not any(torch.allclose(net(z, r, t, told), net(z, r, t, other)) for other in others)


@torch.no_grad()
def test_conditions_it_was_not_built_for_are_left_alone(point):
    z, r, t, _ = point
    net = small()
    assert torch.equal(net(z, r, t), net(z, r, t, everything()))


@torch.no_grad()
def test_the_second_head_can_be_left_out(point):
    z, r, t, _ = point
    net = small(v_head_blocks=2)
    u, v = net.heads(z, r, t)
    twin = net.without_v_head()
    assert torch.equal(u, net(z, r, t))
    assert not torch.allclose(u, v)
    assert torch.equal(u, twin(z, r, t))
    assert not any(name.startswith(MeanFlowMLP.V_HEAD_MODULES) for name in twin.state_dict())
    with pytest.raises(ValueError, match="v_head_blocks=0"):
        twin.heads(z, r, t)


def test_muon_gets_the_hidden_matrices_alone():
    net = small(v_head_blocks=1, classes=2)
    names = {name.rsplit(".", 1)[0] for name, p in net.named_parameters() if p.ndim == 2}
    left = {name for name in names if name.startswith(MeanFlowMLP.ADAMW_MODULES)}
    assert left == {"first", "class_embedding", "out", "v_head.out"}
    assert names - left == {"hidden.0", "hidden.1", "v_head.hidden.0"}
