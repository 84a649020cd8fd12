from __future__ import annotations

import pytest
import torch
from torch import nn

from neuromf.config import ObjectiveConfig
from neuromf.losses.meanflow import adaptive_weight, imf_terms, lp_loss, meanflow_terms, rectflow_terms
from neuromf.training.objective import Draws, Objective

FIGURES = {
    "raw", "weighted", "denominator", "moving", "r", "t", "u_norm", "V_norm", "v_norm", "v_tilde_norm", "jvp_norm",
    "cosine_V", "cosine_v_tilde", "relative_error", "x_mean", "x_square", "x_min", "x_max",
}  # fmt: skip


class Small(nn.Module):
    """A smooth network of z, r and t in whose output every weight takes part."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inside, self.outside, self.times = nn.Conv3d(2, 6, 1), nn.Conv3d(6, 2, 1), nn.Linear(2, 6)
        self.calls: list[int] = []

    def forward(self, z, r, t):
        self.calls.append(len(z))
        times = self.times(torch.stack([r, t], dim=1))
        return self.outside(torch.tanh(self.inside(z) + times.reshape(*times.shape, 1, 1, 1)))


@pytest.fixture
def draws():
    x, eps = torch.randn(2, 4, 2, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    return x, eps, torch.tensor([0.2, 0.4, 0.0, 0.6]), torch.tensor([0.9, 0.4, 1.0, 0.6])


def objective(**settings) -> Objective:
    return Objective(Small(), ObjectiveConfig(**settings))


def terms_of(ours: Objective, draws):
    x, *random = draws
    return ours.terms(x, Draws(*random))


@pytest.mark.parametrize(("name", "terms"), [("imf", imf_terms), ("meanflow", meanflow_terms)])
@pytest.mark.parametrize("prediction", ["u", "x"])
def test_the_name_chooses_the_tangent(draws, name, terms, prediction):
    ours = objective(name=name, prediction=prediction)
    found, expected = terms_of(ours, draws), terms(ours.u, *draws)
    assert torch.equal(found.V, expected.V)
    assert torch.equal(found.tangent, expected.tangent)


def test_rectified_flow_ignores_r_and_takes_no_derivative(draws):
    x, eps, _, t = draws
    ours = objective(name="rectflow", prediction="u")
    found = terms_of(ours, draws)
    assert ours.network.calls == [4]
    assert torch.equal(found.V, rectflow_terms(ours.u, x, eps, t).V)


def test_the_output_is_read_as_a_velocity_or_as_data(draws):
    z, _, r, t = draws
    u, x = objective(prediction="u"), objective(prediction="x", t_min=0.5)
    output = u.network(z, r, t)
    assert torch.equal(u.u(z, r, t), output)
    clamped = torch.tensor([0.9, 0.5, 1.0, 0.6]).reshape(4, 1, 1, 1, 1)
    torch.testing.assert_close(x.u(z, r, t), (z - output) / clamped)


def test_the_derivative_strategy_is_the_configured_one(draws):
    exact, rough = objective(prediction="u"), objective(prediction="u", derivative="finite-difference", fd_step=1e-2)
    a, b = terms_of(exact, draws).du_dt, terms_of(rough, draws).du_dt
    assert not torch.equal(a, b)
    torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_loss_is_the_batch_mean_of_the_weighted_raw_losses(draws, reduction):
    settings = {"lp": (1.5, 2.0), "loss_reduction": reduction, "norm_p": 0.7, "norm_eps": 0.3}
    factors = torch.tensor([0.5, 2.0])
    ours = Objective(Small(), ObjectiveConfig(**settings), factors)
    loss, terms = ours(*draws), terms_of(ours, draws)
    raw = lp_loss(terms.V, terms.target, lp=(1.5, 2.0), reduction=reduction, channel_weights=factors)
    torch.testing.assert_close(loss.value, (raw * adaptive_weight(raw, 0.7, 0.3)).mean())
    torch.testing.assert_close(loss.record["raw"], raw.detach())


def test_fm_weight_adds_the_flow_matching_loss_with_a_gradient(draws):
    x, eps, _, t = draws
    plain, both = objective(), objective(fm_weight=2.0)
    flow = objective(name="rectflow")
    torch.testing.assert_close(both(*draws).value, plain(*draws).value + 2 * flow(x, eps, t, t).value)
    gradients = [torch.autograd.grad(o(*draws).value, o.network.outside.weight)[0] for o in (plain, both)]
    assert not torch.allclose(gradients[0], gradients[1])


@pytest.mark.parametrize("name", ["imf", "meanflow", "pmf", "rectflow", "alphaflow"])
def test_every_objective_trains_every_weight_of_a_network_that_knows_no_condition(draws, name):
    ours = objective(name=name, alpha_schedule=(0.0, 1.0) if name == "alphaflow" else None)
    ours(*draws, progress=0.5).value.backward()
    assert all(p.grad is not None and p.grad.any() for p in ours.parameters())


def test_the_record_holds_one_detached_figure_a_sample(draws):
    ours = objective()
    loss = ours(*draws)
    assert set(loss.record) == FIGURES
    assert all(value.shape == (4,) and not value.requires_grad for value in loss.record.values())


def test_the_figures_mean_what_they_are_called(draws):
    x, eps, r, t = draws
    ours = objective(prediction="u")
    record, terms = ours(*draws).record, terms_of(ours, draws)
    rms = lambda value: value.detach().flatten(1).square().mean(1).sqrt()
    x_hat = terms.z - t.reshape(4, 1, 1, 1, 1) * terms.u.detach()
    expected = {
        "moving": r < t,
        "u_norm": rms(terms.u),
        "V_norm": rms(terms.V),
        "v_norm": rms(eps - x),
        "jvp_norm": rms(terms.du_dt),
        "relative_error": rms(terms.V - terms.target) / rms(terms.target),
        "denominator": record["raw"] + 1.0,
        "x_mean": x_hat.flatten(1).mean(1),
        "x_max": x_hat.flatten(1).amax(1),
    }
    for name, value in expected.items():
        torch.testing.assert_close(record[name], value)
    cosine = (terms.V * terms.target).flatten(1).sum(1) / (
        terms.V.flatten(1).norm(dim=1) * (eps - x).flatten(1).norm(dim=1)
    )
    torch.testing.assert_close(record["cosine_V"], cosine.detach())


def test_the_weighted_loss_hides_what_the_raw_one_shows(draws):
    x, eps, r, t = draws
    ours = objective(norm_p=1.0, norm_eps=1e-6)
    near, far = ours(x, eps, r, t), ours(1000 * x, eps, r, t)
    assert far.value.item() == pytest.approx(near.value.item(), rel=1e-4)
    assert (far.record["raw"] > 1000 * near.record["raw"]).all()


# --- channel weights -----------------------------------------------------------------------------------------


def learned(**settings) -> Objective:
    return Objective(
        Small(), ObjectiveConfig(channel_weights="learned", norm_p=0.5, norm_eps=0.3, **settings), channels=2
    )


def test_learned_weights_scale_the_channels_and_their_price_lies_outside_the_adaptive_weight(draws):
    ours = learned()
    with torch.no_grad():
        ours.log_variances.copy_(torch.tensor([0.7, -0.4]))
    terms, loss = terms_of(ours, draws), ours(*draws)
    each = (terms.V - terms.target).square().flatten(2).mean(2) / 2
    weighed = each @ torch.tensor([-0.7, 0.4]).exp()
    expected = (weighed * adaptive_weight(weighed, 0.5, 0.3)).mean() + 0.3
    torch.testing.assert_close(loss.value, expected)
    torch.testing.assert_close(loss.record["raw"], each.sum(1).detach())  # what is reported does not depend on them
    (gradient,) = torch.autograd.grad(loss.value, ours.log_variances)
    share = each * torch.tensor([-0.7, 0.4]).exp() * adaptive_weight(weighed, 0.5, 0.3)[:, None]
    torch.testing.assert_close(gradient, 1 - share.detach().mean(0))


def test_learned_weights_are_the_objectives_own_and_begin_without_effect(draws):
    ours = learned()
    torch.testing.assert_close(ours(*draws).value, objective(norm_p=0.5, norm_eps=0.3)(*draws).value)
    assert "log_variances" in dict(ours.named_parameters())
    assert set(ours.own_state()) == {"log_variances"}
    assert objective().own_state() == {}
    given = Objective(Small(), ObjectiveConfig(channel_weights=(1.0, 2.0)), torch.tensor([1.0, 2.0]))
    assert given.own_state() == {}  # the settings hold them
