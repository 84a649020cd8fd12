from __future__ import annotations

import pytest
import torch
from torch import nn

from neuromf.conditions import Condition
from neuromf.models.wrappers import Padded, Patched, Preconditioned


class Doubling(nn.Module):
    """Doubles in its first head and negates in its second; keeps what it was given."""

    ADAMW_MODULES = ("first", "last")

    def __init__(self, v_head: bool = True) -> None:
        super().__init__()
        self.v_head = v_head

    def forward(self, z, r, t, condition=None):
        self.seen, self.condition = z, condition
        return 2 * z

    def heads(self, z, r, t, condition=None):
        return self(z, r, t, condition), -z

    def without_v_head(self):
        return Doubling(v_head=False)


@pytest.mark.parametrize(("size", "padded"), [((4, 4, 4), (4, 4, 4)), ((5, 3, 6), (8, 4, 8)), ((1, 2, 9), (4, 4, 12))])
def test_padding_reaches_the_next_allowed_size_and_is_cropped_away(size, padded):
    z, inner = torch.randn(2, 3, *size), Doubling()
    assert torch.equal(Padded(inner, 4)(z, None, None), 2 * z)
    assert inner.seen.shape == (2, 3, *padded)
    assert inner.seen.sum() == pytest.approx(float(z.sum()), abs=1e-4)


def test_odd_padding_has_its_smaller_half_in_front():
    inner = Doubling()
    Padded(inner, 4)(torch.ones(1, 1, 1, 4, 4), None, None)
    assert inner.seen[0, 0, :, 0, 0].tolist() == [0, 1, 0, 0]


def test_a_block_of_cells_becomes_channels():
    z, inner = torch.randn(2, 3, 4, 6, 2), Doubling()
    assert torch.equal(Patched(inner, 2)(z, None, None), 2 * z)
    assert inner.seen.shape == (2, 24, 2, 3, 1)
    block = z[1, :, 2:4, 4:6, 0:2]
    assert torch.equal(inner.seen[1, :, 1, 2, 0], block.flatten())


@pytest.mark.parametrize("wrap", [lambda net: Padded(net, 4), lambda net: Patched(net, 2)])
def test_conditions_and_both_heads_pass_through(wrap):
    z, inner = torch.randn(2, 3, 4, 2, 6), Doubling()
    condition = Condition(label=torch.tensor([1, 0]))
    u, v = wrap(inner).heads(z, None, None, condition)
    assert torch.equal(u, 2 * z)
    assert torch.equal(v, -z)
    assert inner.condition is condition


def test_what_is_inside_is_reached_through_both_wrappers():
    whole = Padded(Patched(Doubling(), 2), 4)
    bare = whole.without_v_head()
    assert whole.network.network.v_head
    assert not bare.network.network.v_head
    assert (bare.rule, bare.network.patch) == (4, 2)
    assert whole.ADAMW_MODULES == ("network.network.first", "network.network.last")


class Constant(nn.Module):
    """Answers the same number everywhere; keeps what it was given."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, z, r, t, condition=None):
        self.seen = z
        return torch.full_like(z, self.value)

    def heads(self, z, r, t, condition=None):
        return self(z, r, t), torch.full_like(z, -self.value)


def straight_path(t: float, n: int = 20_000):
    x, eps = torch.randn(2, n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    times = torch.full((n,), t, dtype=torch.float64)
    return x, (1 - t) * x + t * eps, times


@pytest.mark.parametrize("t", [0.05, 0.3, 0.5, 0.9, 1.0])
def test_a_silent_network_preconditioned_is_the_best_linear_estimate_of_white_data(t):
    x, z, times = straight_path(t)
    found = Preconditioned(Constant(0.0))(z, times, times)
    slope = (x * z).mean() / z.square().mean()
    torch.testing.assert_close((found * z).mean() / z.square().mean(), slope, rtol=0, atol=0.02)
    assert (found - x).square().mean().item() == pytest.approx(t**2 / ((1 - t) ** 2 + t**2), rel=0.05)


@pytest.mark.parametrize("t", [0.05, 0.5, 1.0])
def test_the_network_inside_sees_and_is_asked_for_values_of_size_one(t):
    x, z, times = straight_path(t)
    inner = Constant(0.0)
    silent = Preconditioned(inner)(z, times, times)
    assert inner.seen.std().item() == pytest.approx(1, rel=0.03)
    gain = Preconditioned(Constant(1.0))(z, times, times) - silent
    wanted = (x - silent) / gain
    assert wanted.std().item() == pytest.approx(1, rel=0.03)


def test_at_the_noise_end_the_estimate_is_the_networks_own_answer_and_at_the_data_end_the_input():
    z, one = torch.randn(2, 3, 2, 2, 2), torch.ones(2)
    net = Preconditioned(Constant(0.7))
    assert torch.equal(net(z, 0 * one, one), torch.full_like(z, 0.7))
    assert torch.equal(net(z, 0 * one, 0 * one), z)
    u, v = net.heads(z, 0 * one, one)
    assert (u == 0.7).all()
    assert (v == -0.7).all()


def test_the_velocity_of_a_preconditioned_estimate_stays_finite_towards_the_data():
    _, z, times = straight_path(1e-3, n=100)
    u = (z - Preconditioned(Constant(1.0))(z, times, times)) / times[:, None]
    expected = (2 * times[0] - 1) * z - 1  # s is one to within 1e-3
    torch.testing.assert_close(u, expected, rtol=0.01, atol=0.02)
