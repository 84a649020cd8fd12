from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from neuromf.losses.derivative import exact
from neuromf.losses.meanflow import (
    adaptive_weight,
    alphaflow_terms,
    channel_losses,
    compound_velocity,
    flow_alpha,
    imf_terms,
    lp_loss,
    meanflow_terms,
    pmf_target,
    rectflow_terms,
    uncertainty_weighted,
    weighted,
)
from neuromf.losses.path import interpolate, per_sample
from neuromf.sampling.solvers import jump, one_step, time_grid

S = 0.6  # standard deviation of the Gaussian data


def sigma(t: Tensor) -> Tensor:
    """sigma_t of z_t for x ~ N(0, S^2)."""
    return ((1 - t) ** 2 * S**2 + t**2).sqrt()


def gaussian_v(z: Tensor, t: Tensor) -> Tensor:
    """E[eps - x | z_t = z]."""
    return per_sample((t - (1 - t) * S**2) / sigma(t) ** 2, z) * z


def gaussian_u(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
    """(1 - sigma_r / sigma_t) z / (t - r), and its limit v where r = t."""
    h = torch.where(r == t, 1.0, t - r)
    average = per_sample((1 - sigma(r) / sigma(t)) / h, z) * z
    return torch.where(per_sample(r == t, z), gaussian_v(z, t), average)


@pytest.fixture
def batch():
    """x, eps, r, t with B == C == 4: two samples with r < t, two with r = t."""
    generator = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 4, 4, 2, 3, 2, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.9, 0.4, 1.0, 0.6], dtype=torch.float64)
    return S * x, eps, torch.tensor([0.2, 0.4, 0.0, 0.6], dtype=torch.float64), t


# --- the Gaussian, whose average velocity is known ---------------------------------------------------------------


def test_the_gaussian_obeys_the_meanflow_identity(batch):
    z, _, r, t = batch
    moving = r < t
    z, r, t = z[moving], r[moving], t[moving]
    v = gaussian_v(z, t)
    V = compound_velocity(gaussian_u(z, r, t), exact(gaussian_u, z, r, t, v), r, t)
    torch.testing.assert_close(V, v, rtol=1e-12, atol=1e-12)


def test_the_true_field_has_the_instantaneous_velocity_as_its_compound_velocity(batch):
    x, eps, r, t = batch
    terms = imf_terms(gaussian_u, x, eps, r, t)
    torch.testing.assert_close(terms.V, gaussian_v(terms.z, t), rtol=1e-12, atol=1e-12)


def test_the_average_velocity_tends_to_the_instantaneous_one(batch):
    z, _, _, t = batch
    gaps = [(gaussian_u(z, t - h, t) - gaussian_u(z, t, t)).abs().max() for h in (1e-3, 1e-4)]
    assert gaps[0] / gaps[1] == pytest.approx(10, rel=0.01)


@pytest.mark.parametrize("steps", [2, 8])
def test_any_number_of_steps_lands_on_the_same_point(batch, steps):
    eps = batch[1]
    once = one_step(gaussian_u, eps)
    torch.testing.assert_close(once, S * eps, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(jump(gaussian_u, eps, time_grid(steps)), once, rtol=1e-12, atol=1e-12)


# --- the terms ---------------------------------------------------------------------------------------------------


def test_the_derivative_is_taken_only_on_the_samples_with_r_below_t(batch):
    x, eps, r, t = batch
    sizes = {"derivative": [], "u": []}

    def u(z, r_, t_):
        sizes["u"].append(len(z))
        return gaussian_u(z, r_, t_)

    def recorded(field, z, r_, t_, tangent):
        assert (r_ < t_).all()
        sizes["derivative"].append(len(z))
        return exact(gaussian_u, z, r_, t_, tangent)

    terms = imf_terms(u, x, eps, r, t, derivative=recorded)
    assert sizes == {"derivative": [2], "u": [2, 4]}  # boundary tangent, then the whole batch once
    assert torch.equal(terms.moving, r < t)
    assert (terms.du_dt[~terms.moving] == 0).all()
    assert (terms.du_dt[terms.moving] != 0).any()


def test_a_batch_without_moving_samples_costs_one_evaluation(batch):
    x, eps, _, t = batch
    calls = []
    terms = imf_terms(lambda z, r, t_: calls.append(len(z)) or gaussian_u(z, r, t_), x, eps, t, t)
    assert calls == [4]
    assert torch.equal(terms.V, terms.u)


def test_the_gradient_flows_through_u_alone(batch):
    x, eps, r, t = batch
    a = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    u = lambda z, r_, t_: a * gaussian_u(z, r_, t_)
    terms = imf_terms(u, x, eps, r, t)
    assert not terms.du_dt.requires_grad
    assert not terms.tangent.requires_grad
    assert not terms.target.requires_grad
    (gradient,) = torch.autograd.grad(terms.V.sum(), a)
    torch.testing.assert_close(gradient, gaussian_u(terms.z, r, t).sum())


def test_the_two_tangents_are_the_data_velocity_and_the_networks_own(batch):
    x, eps, r, t = batch
    moving = r < t
    velocity = meanflow_terms(gaussian_u, x, eps, r, t)
    boundary = imf_terms(gaussian_u, x, eps, r, t)
    assert torch.equal(velocity.tangent, eps - x)
    torch.testing.assert_close(boundary.tangent[moving], gaussian_v(boundary.z, t)[moving])


def test_points_and_volumes_agree_with_as_many_samples_as_channels(batch):
    x, eps, r, t = batch
    volume = imf_terms(gaussian_u, x, eps, r, t)
    flat = imf_terms(gaussian_u, x.flatten(1), eps.flatten(1), r, t)
    for name in ("V", "target", "u", "du_dt", "tangent", "z"):
        torch.testing.assert_close(getattr(volume, name).flatten(1), getattr(flat, name), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(lp_loss(volume.V, volume.target), lp_loss(flat.V, flat.target))


def test_moving_samples_may_have_a_field_of_their_own(batch):
    x, eps, r, t = batch
    sizes = []
    own = lambda z, r_, t_: sizes.append(len(z)) or gaussian_u(z, r_, t_)
    terms = imf_terms(gaussian_u, x, eps, r, t, u_moving=own)
    assert sizes == [2, 2]
    assert torch.equal(terms.V, imf_terms(gaussian_u, x, eps, r, t).V)


def test_rectified_flow_regresses_the_velocity_at_r_equal_t(batch):
    x, eps, _, t = batch
    terms = rectflow_terms(gaussian_u, x, eps, t)
    torch.testing.assert_close(terms.V, gaussian_v(terms.z, t))
    assert torch.equal(terms.target, eps - x)
    assert not terms.moving.any()


def test_the_loss_of_the_true_field_is_the_variance_nothing_can_explain():
    # E|V - v_c|^2 is least where V = E[v_c | z_t] = v: what is left is the variance of v_c given z_t.
    generator = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 20_000, 1, generator=generator, dtype=torch.float64)
    r, t = torch.full((20_000,), 0.3, dtype=torch.float64), torch.full((20_000,), 0.8, dtype=torch.float64)
    unexplained = (S / sigma(t[0])) ** 2  # Var(eps - x | z_t) = S^2 / sigma_t^2

    def loss(factor: float) -> Tensor:
        terms = imf_terms(lambda z, r_, t_: factor * gaussian_u(z, r_, t_), S * x, eps, r, t)
        return lp_loss(terms.V, terms.target).mean()

    assert loss(1.0).item() == pytest.approx(unexplained.item(), rel=0.03)
    assert loss(1.0) < min(loss(0.9), loss(1.1))


def test_pixel_meanflows_target_is_the_velocity_above_the_clamp_and_shrinks_below_it(batch):
    x, eps, _, _ = batch
    t = torch.tensor([0.01, 0.05, 0.4, 1.0], dtype=torch.float64)
    shrunk = torch.tensor([0.2, 1.0, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(pmf_target(x, eps, t, t_min=0.05), per_sample(shrunk, x) * (eps - x))


# --- alpha-Flow ----------------------------------------------------------------------------------------------------


def gradient_of_alphaflow(batch, alpha: float, norm_p: float) -> Tensor:
    """As the paper writes it: D = u - (alpha v_c + (1 - alpha) sg u(z_s, r, s))."""
    x, eps, r, t = batch
    a = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    u = lambda z, r_, t_: a * gaussian_u(z, r_, t_)
    z, v = interpolate(x, eps, t), eps - x
    s = alpha * r + (1 - alpha) * t
    D = u(z, r, t) - (alpha * v + (1 - alpha) * u(z - per_sample(t - s, z) * v, r, s).detach())
    square = D.square().flatten(1).sum(1)
    loss = (square / alpha) / (square / alpha**2 + 0.01).detach() ** norm_p
    return torch.autograd.grad(loss.mean(), a)[0]


def gradient_of_terms(terms_of, batch, weight: float, norm_p: float) -> Tensor:
    a = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    terms = terms_of(lambda z, r, t: a * gaussian_u(z, r, t), *batch)
    scale = torch.where(terms.moving, weight, 1.0).double()
    return torch.autograd.grad((scale * weighted(lp_loss(terms.V, terms.target), norm_p, 0.01)).mean(), a)[0]


@pytest.mark.parametrize("norm_p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0])
def test_the_compound_form_of_alphaflow_has_the_papers_gradient(batch, alpha, norm_p):
    found = gradient_of_terms(lambda u, *draws: alphaflow_terms(u, *draws, alpha), batch, alpha, norm_p)
    torch.testing.assert_close(found, gradient_of_alphaflow(batch, alpha, norm_p), rtol=1e-10, atol=0)


def test_at_alpha_one_it_is_trajectory_flow_matching(batch):
    x, eps, r, t = batch
    calls = []
    terms = alphaflow_terms(lambda *at: calls.append(len(at[0])) or gaussian_u(*at), x, eps, r, t, 1.0)
    assert calls == [4]
    assert torch.equal(terms.V, gaussian_u(terms.z, r, t))
    assert torch.equal(terms.target, eps - x)


@pytest.mark.parametrize("norm_p", [0.0, 0.5, 1.0])
def test_as_alpha_vanishes_it_has_meanflows_gradient(batch, norm_p):
    limit = gradient_of_terms(meanflow_terms, batch, 1.0, norm_p)
    errors = []
    for alpha in (1e-2, 1e-3):
        found = gradient_of_terms(lambda u, *d, a=alpha: alphaflow_terms(u, *d, a), batch, alpha, norm_p)
        errors.append(abs(found - limit) / abs(limit))
    assert errors[1] < 2e-3
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.2)


def test_alpha_falls_along_a_sigmoid_and_snaps_at_both_ends():
    assert flow_alpha(0.5, 0.0, 1.0) == 0.5
    assert flow_alpha(0.4, 0.0, 1.0) == pytest.approx(1 / (1 + math.exp(-2.5)))
    assert [flow_alpha(p, 0.2, 0.6) for p in (0.0, 0.2, 0.6, 1.0)] == [1.0, 1.0, 0.0, 0.0]
    path = [flow_alpha(p / 50, 0.0, 1.0) for p in range(51)]
    assert path == sorted(path, reverse=True)


# --- the loss ----------------------------------------------------------------------------------------------------

DIFFERENCE = torch.tensor([[[1.0, -4.0], [0.0, 2.25]]])  # one sample, two channels, two elements
SUMS = {1.0: 7.25, 1.5: 1 + 8 + 3.375, 2.0: 1 + 16 + 5.0625, 3.0: 1 + 64 + 11.390625}


@pytest.mark.parametrize(("lp", "expected"), SUMS.items())
def test_lp_by_hand(lp, expected):
    zero = torch.zeros_like(DIFFERENCE)
    assert lp_loss(DIFFERENCE, zero, lp=lp, reduction="sum").tolist() == pytest.approx([expected])
    assert lp_loss(DIFFERENCE, zero, lp=lp, reduction="mean").tolist() == pytest.approx([expected / 4])


def test_each_channel_may_have_its_own_exponent_and_weight():
    zero = torch.zeros_like(DIFFERENCE)
    assert lp_loss(DIFFERENCE, zero, lp=(1.5, 2.0)).item() == pytest.approx(9 + 5.0625)
    weights = torch.tensor([2.0, 10.0])
    assert lp_loss(DIFFERENCE, zero, channel_weights=weights).item() == pytest.approx(2 * 17 + 10 * 5.0625)
    mixed = lp_loss(DIFFERENCE, zero, lp=(1.0, 3.0), channel_weights=weights, reduction="mean")
    assert mixed.item() == pytest.approx((2 * 5 + 10 * 11.390625) / 4)


@pytest.mark.parametrize("arguments", [{"lp": (1.0, 2.0, 3.0)}, {"channel_weights": torch.ones(3)}])
def test_a_wrong_number_of_exponents_or_weights_is_refused(arguments):
    with pytest.raises(ValueError, match=r"3 .* for 2 channels"):
        lp_loss(DIFFERENCE, DIFFERENCE, **arguments)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_channels_add_up_to_the_sample(reduction):
    a, b = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(channel_losses(a, b, reduction=reduction).sum(1), lp_loss(a, b, reduction=reduction))


def test_learned_weights_are_best_at_the_logarithm_of_each_channels_loss():
    raw = torch.tensor([[2.0, 0.5], [4.0, 1.5]], dtype=torch.float64)
    s = raw.mean(0).log().requires_grad_()
    torch.testing.assert_close(uncertainty_weighted(raw, torch.zeros(2, dtype=torch.float64)), raw.sum(1))
    (uncertainty_weighted(raw, s).mean() + s.sum()).backward()
    torch.testing.assert_close(s.grad, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-15)


@pytest.mark.parametrize("lp", [1.0, 1.5, 2.0, 3.0])
def test_a_perfect_prediction_has_a_finite_gradient(lp):
    prediction = torch.zeros(2, 3, 4, requires_grad=True)
    lp_loss(prediction, torch.zeros(2, 3, 4), lp=lp).sum().backward()
    assert (prediction.grad == 0).all()


def test_half_precision_is_summed_in_float32_and_double_stays_double():
    many = torch.full((1, 1, 100_000), 1.0)
    assert lp_loss(many.bfloat16(), torch.zeros_like(many).bfloat16()).item() == 100_000
    assert lp_loss(many.double(), torch.zeros_like(many).double()).dtype == torch.float64


def test_the_adaptive_weight_is_detached():
    raw = torch.tensor([0.5, 8.0], requires_grad=True)
    weight = adaptive_weight(raw, norm_p=0.5, norm_eps=1.0)
    assert not weight.requires_grad
    assert weight.tolist() == pytest.approx([1.5**-0.5, 9**-0.5])
    weighted(raw, 0.5, 1.0).sum().backward()
    assert torch.equal(raw.grad, weight)


def test_without_a_power_the_weighted_loss_is_the_raw_one():
    raw = torch.tensor([0.5, 8.0])
    assert torch.equal(weighted(raw, norm_p=0.0, norm_eps=1.0), raw)
