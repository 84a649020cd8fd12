"""The members of the family on a small network for points: second head, clipped target, alpha, classes, crops."""

from __future__ import annotations

import pytest
import torch

from neuromf.conditions import Condition
from neuromf.config import GuidanceConfig, ObjectiveConfig
from neuromf.losses.meanflow import adaptive_weight, flow_alpha
from neuromf.losses.path import interpolate, per_sample
from neuromf.models.mlp import MeanFlowMLP
from neuromf.training.objective import Draws, Objective

K = 3
HEAD = {"tangent": "v-head", "norm_p": 0.7, "norm_eps": 0.3, "loss_reduction": "sum", "t_min": 0.05}
ALPHA = {"name": "alphaflow", "alpha_schedule": (0.2, 0.8), "norm_p": 0.5, "norm_eps": 0.1, "loss_reduction": "sum"}
LABEL = torch.tensor([0, 1, 2, 0, 1, 2])
DROPPED = torch.tensor([False, True, False, False, True, False])
OMEGA = torch.tensor([2.0, 3.0, 8.0, 4.0, 5.0, 1.0], dtype=torch.float64)
INTERVAL = torch.tensor([[0.1, 0.8], [0.0, 1.0], [0.0, 1.0], [0.2, 0.9], [0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
GUIDED = {"classes": K, "guidance": GuidanceConfig(enabled=True), "takes_scales": True}


@pytest.fixture
def points():
    """x, eps, r, t of six small samples in float64; two among them have r = t."""
    x, eps = torch.randn(2, 6, 2, 2, 2, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    t = torch.tensor([0.9, 0.6, 1.0, 0.5, 0.02, 0.03], dtype=torch.float64)
    return x, eps, torch.tensor([0.2, 0.6, 0.0, 0.4, 0.02, 0.01], dtype=torch.float64), t


def terms_of(ours: Objective, draws):
    x, *random = draws
    return ours.terms(x, Draws(*random))


def point_network(v_head: bool = False, classes: int = 0, guidance: bool = False) -> MeanFlowMLP:
    torch.manual_seed(0)
    shape = {"shape": (2, 2, 2, 1), "width": 10, "depth": 2}
    return MeanFlowMLP(**shape, v_head_blocks=int(v_head), classes=classes, guidance=guidance).double()


def point_objective(
    *, guidance: GuidanceConfig | None = None, classes: int = 0, takes_scales: bool = False, **settings
) -> Objective:
    network = point_network(settings.get("tangent") == "v-head", classes, takes_scales)
    return Objective(network, ObjectiveConfig(**settings), guidance=guidance, classes=classes)


# --- the second head -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["imf", "pmf"])
def test_the_second_head_has_a_loss_of_its_own_at_the_actual_gap(points, name):
    x, eps, r, t = points
    ours = point_objective(name=name, **HEAD, vhead_weight=3.0)
    without = point_objective(name=name, **HEAD, vhead_weight=0.0)
    found, terms = ours(*points), terms_of(ours, points)
    v = ours.heads(interpolate(x, eps, t), r, t)[1]
    raw_v = (v - terms.target).square().flatten(1).sum(1)
    torch.testing.assert_close(found.record["raw_v"], raw_v.detach())
    own = (raw_v * adaptive_weight(raw_v, 0.7, 0.3)).mean()
    torch.testing.assert_close(found.value, without(*points).value + 3 * own)


def test_the_tangent_is_the_second_heads_velocity_and_carries_no_gradient(points):
    x, eps, r, t = points
    ours = point_objective(**HEAD, vhead_weight=0.0)
    terms = terms_of(ours, points)
    moving = r < t
    expected = ours.heads(interpolate(x, eps, t), t, t)[1]
    torch.testing.assert_close(terms.tangent[moving], expected[moving].detach())
    ours(*points).value.backward()
    head = [p.grad for name, p in ours.named_parameters() if "v_head" in name]
    assert head
    assert all(grad is None or not grad.any() for grad in head)
    assert all(p.grad.any() for name, p in ours.named_parameters() if "v_head" not in name)


def test_the_two_heads_are_trained_by_their_own_losses(points):
    ours = point_objective(**HEAD)
    ours(*points).value.backward()
    assert all(p.grad is not None and p.grad.any() for p in ours.parameters())


# --- pMF's clipped target ------------------------------------------------------------------------------------


def test_pmf_clips_its_target_as_it_clips_its_prediction(points):
    x, eps, *_ = points
    terms = terms_of(point_objective(name="pmf", t_min=0.05), points)
    slope = torch.tensor([1, 1, 1, 1, 0.4, 0.6], dtype=torch.float64)
    torch.testing.assert_close(terms.target, per_sample(slope, x) * (eps - x))
    plain = terms_of(point_objective(name="imf", t_min=0.05), points)
    torch.testing.assert_close(plain.target, eps - x)


# --- alpha-Flow ----------------------------------------------------------------------------------------------


def test_alphaflow_begins_as_trajectory_flow_matching_and_ends_as_meanflow(points):
    x, eps, r, t = points
    ours = point_objective(**ALPHA)
    assert (ours.flow_alpha(0.0), ours.flow_alpha(0.2)) == (1.0, 1.0)
    assert (ours.flow_alpha(0.8), ours.flow_alpha(1.0)) == (0.0, 0.0)
    z = interpolate(x, eps, t)
    raw = (ours.u(z, r, t) - (eps - x)).square().flatten(1).sum(1)
    torch.testing.assert_close(ours(*points, progress=0.1).value, (raw * adaptive_weight(raw, 0.5, 0.1)).mean())
    meanflow = point_objective(**{**ALPHA, "name": "meanflow", "alpha_schedule": None})
    assert torch.equal(ours(*points, progress=0.9).value, meanflow(*points).value)


def test_alphaflow_in_between_is_the_papers_loss(points):
    """(|D|^2 / a) / sg(|D|^2 / a^2 + c)^p with D = u - (a v_c + (1 - a) sg u(z_s, r, s)), by hand."""
    x, eps, r, t = points
    ours, alpha = point_objective(**ALPHA), flow_alpha(0.55, 0.2, 0.8)
    assert 0.1 < alpha < 0.5
    z, s = interpolate(x, eps, t), alpha * r + (1 - alpha) * t
    ahead = ours.u(z - per_sample(t - s, z) * (eps - x), r, s).detach()
    moving = per_sample(r < t, z)
    target = torch.where(moving, alpha * (eps - x) + (1 - alpha) * ahead, eps - x)
    square = (ours.u(z, r, t) - target).square().flatten(1).sum(1)
    a = torch.where(r < t, alpha, 1.0)
    expected = (square / a) / (square.detach() / a**2 + 0.1) ** 0.5
    found = ours(*points, progress=0.55)
    torch.testing.assert_close(found.value, expected.mean())
    gradients = [torch.autograd.grad(value, list(ours.parameters())) for value in (found.value, expected.mean())]
    for ours_, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours_, theirs)


def test_the_other_objectives_know_no_progress(points):
    ours = point_objective(name="imf")
    assert ours.flow_alpha(0.5) is None
    assert torch.equal(ours(*points, progress=0.0).value, ours(*points, progress=1.0).value)


# --- classes and guidance ------------------------------------------------------------------------------------


def told(points, *, label=LABEL, dropped=DROPPED) -> tuple:
    x, eps, r, t = points
    return x, eps, r, t, Condition(label, OMEGA, INTERVAL), dropped


def velocity_of(ours: Objective, points, label, omega=None) -> torch.Tensor:
    """The network's instantaneous velocity under a label and a scale, in the whole interval."""
    x, eps, _, t = points
    whole = torch.tensor([[0.0, 1.0]], dtype=torch.float64).expand(6, 2)
    condition = Condition(label) if omega is None else Condition(label, omega, whole)
    return ours.v(interpolate(x, eps, t), t, condition).detach()


@pytest.mark.parametrize("tangent", ["boundary", "v-head"])
def test_imf_is_guided_at_the_scale_of_each_sample_and_inside_its_interval(points, tangent):
    x, eps, r, t = points
    ours = point_objective(tangent=tangent, t_min=0.01, **GUIDED)
    terms = terms_of(ours, told(points))
    acts = torch.tensor([False, True, True, True, True, True])  # t of the first lies above its interval
    omega = torch.where(acts, OMEGA, 1.0)
    v_cond = velocity_of(ours, points, LABEL, omega)
    v_null = velocity_of(ours, points, torch.full_like(LABEL, K), torch.ones_like(OMEGA))
    guided = (eps - x) + per_sample(1 - 1 / omega, x) * (v_cond - v_null)
    expected = torch.where(per_sample(DROPPED, x), eps - x, guided)
    torch.testing.assert_close(terms.target, expected)
    assert not torch.allclose(terms.target[2], (eps - x)[2])
    moving = r < t
    torch.testing.assert_close(terms.tangent[moving], v_cond[moving])  # of the old label where it was dropped
    seen = Condition(torch.where(DROPPED, K, LABEL), OMEGA, INTERVAL)
    torch.testing.assert_close(terms.u, ours.u(terms.z, r, t, seen))
    assert not terms.target.requires_grad


def test_meanflow_is_guided_at_one_scale_and_inside_one_interval(points):
    x, eps, r, t = points
    guidance = GuidanceConfig(enabled=True, omega=1.8, kappa=0.5, interval=(0.5, 0.95))
    ours = point_objective(name="meanflow", classes=K, guidance=guidance)
    terms = terms_of(ours, (x, eps, r, t, Condition(LABEL), DROPPED))
    null = velocity_of(ours, points, torch.full_like(LABEL, K))
    mixed = 1.8 * (eps - x) + (1 - 1.8 - 0.5) * null + 0.5 * velocity_of(ours, points, LABEL)
    acts = torch.tensor([True, False, False, True, False, False])  # inside the interval, and not dropped
    expected = torch.where(per_sample(acts, x), mixed, eps - x)
    torch.testing.assert_close(terms.target, expected)
    torch.testing.assert_close(terms.tangent, expected)
    torch.testing.assert_close(terms.u, ours.u(terms.z, r, t, Condition(torch.where(DROPPED, K, LABEL))))


@pytest.mark.parametrize("name", ["imf", "meanflow", "pmf", "rectflow", "alphaflow"])
def test_classes_without_guidance_are_told_and_change_no_target(points, name):
    x, eps, r, t = points
    schedule = (0.0, 1.0) if name == "alphaflow" else None
    settings = {"name": name, "t_min": 0.01, "alpha_schedule": schedule}
    ours = point_objective(classes=K, **settings)
    terms = ours.terms(x, Draws(eps, r, t, Condition(LABEL), DROPPED), ours.flow_alpha(0.5))
    seen = torch.where(DROPPED, K, LABEL)
    z, at = interpolate(x, eps, t), t if name == "rectflow" else r
    torch.testing.assert_close(terms.u, ours.u(z, at, t, Condition(seen)))
    torch.testing.assert_close(terms.target, eps - x)
    # One sample after the other, with its own label: no label is mixed up on the r < t share.
    for i in range(6):
        one = [value[i : i + 1] for value in (x, eps, r, t)]
        alone = ours.terms(one[0], Draws(*one[1:], Condition(seen[i : i + 1])), ours.flow_alpha(0.5))
        torch.testing.assert_close(terms.V[i : i + 1], alone.V)


def test_every_class_and_no_class_are_trained(points):
    ours = point_objective(classes=K, t_min=0.01)
    ours(*points, Condition(LABEL), torch.arange(6) < 2).value.backward()
    assert ours.network.class_embedding.weight.grad.any(dim=1).all()
    kept = point_objective(classes=K, t_min=0.01)
    kept(*points, Condition(LABEL), None).value.backward()
    assert kept.network.class_embedding.weight.grad.any(dim=1).tolist() == [True, True, True, False]


def test_a_scale_of_one_is_no_guidance(points):
    x, eps, r, t = points
    ours = point_objective(t_min=0.01, **GUIDED)
    one = Condition(LABEL, torch.ones_like(OMEGA), INTERVAL)
    terms = ours.terms(x, Draws(eps, r, t, one, DROPPED))
    torch.testing.assert_close(terms.target, eps - x)


# --- the perceptual term -------------------------------------------------------------------------------------


class Distance:
    """A stand-in for decoded crops that remembers what it was shown."""

    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def __call__(self, x_hat, x, corner):
        self.seen.append((x_hat.detach(), x, corner))
        return (x_hat - x).abs().flatten(1).mean(1)


def perceptual(**settings) -> Objective:
    settings = {"name": "pmf", "t_min": 0.05, "perceptual_t_max": 0.6, **settings}
    return Objective(point_network(), ObjectiveConfig(**settings), perceptual=Distance())


def test_the_perceptual_term_compares_the_networks_estimate_where_there_is_little_noise(points):
    x, eps, r, t = points
    ours, plain = perceptual(perceptual_weight=2.0), perceptual()
    corner = torch.rand(6, 3)
    loss = ours(*points, corner=corner)
    ((x_hat, shown, at),) = ours.perceptual.seen
    below = t < 0.6
    assert below.tolist() == [False, False, False, True, True, True]
    # The network's own output, below the clamp too.
    torch.testing.assert_close(x_hat, ours.x_hat(interpolate(x, eps, t), r, t)[below])
    assert torch.equal(shown, x[below])
    assert torch.equal(at, corner[below])
    distance = torch.zeros(6, dtype=torch.float64)
    distance[below] = (x_hat - shown).abs().flatten(1).mean(1)
    torch.testing.assert_close(loss.record["perceptual"], distance)
    torch.testing.assert_close(loss.value, plain(*points).value + 2 * distance.mean())
    gradients = [torch.autograd.grad(o(*points, corner=corner).value, o.network.out.weight)[0] for o in (ours, plain)]
    assert not torch.allclose(gradients[0], gradients[1])


def test_the_perceptual_term_is_not_asked_where_there_is_too_much_noise(points):
    x, eps, r, t = points
    ours = perceptual(perceptual_weight=2.0)
    loss = ours(x, eps, r[:1].expand(6), t[:1].expand(6), corner=torch.rand(6, 3))
    assert ours.perceptual.seen == []
    assert loss.record["perceptual"].tolist() == [0.0] * 6
    loss.value.backward()
