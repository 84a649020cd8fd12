"""P3: the network, the objective and its parts, on small channels (SPEC section 12)."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from neuromf.config import ObjectiveConfig, TimesConfig
from neuromf.losses.derivative import exact
from neuromf.losses.meanflow import lp_loss
from neuromf.models.unet import MaisiUNet
from neuromf.training.draws import draw_times
from neuromf.training.ema import Constant, WeightAverage
from neuromf.training.objective import Objective

SHAPE = (4, 4, 4, 4)
ELEMENTS = 4**4


@pytest.fixture(scope="module")
def network() -> MaisiUNet:
    """A MAISI U-Net with attention whose weights, the zero-initialised ones too, are random."""
    torch.manual_seed(0)
    net = MaisiUNet(
        4, channels=(8, 16), attention_levels=(False, True), head_channels=8, res_blocks=1, norm_groups=4
    )  # fmt: skip
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.15 * torch.randn_like(p))
    return net


@pytest.fixture
def draws():
    """x, eps, r, t of a batch of four, half of it with r < t."""
    x, eps = torch.randn(2, 4, *SHAPE, generator=torch.Generator().manual_seed(1))
    return x, eps, torch.tensor([0.2, 0.4, 0.0, 0.6]), torch.tensor([0.9, 0.4, 1.0, 0.6])


def gradients(network: MaisiUNet, draws, autocast: bool = False, **settings) -> tuple[float, dict[str, torch.Tensor]]:
    network.zero_grad(set_to_none=True)
    objective = Objective(network, ObjectiveConfig(**settings))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = objective(*draws)
    loss.value.backward()
    return loss.value.item(), {name: p.grad for name, p in network.named_parameters()}


@pytest.mark.gate("P3-T1")
@pytest.mark.gate("P3-T2")
@pytest.mark.parametrize("size", [(4, 4, 4), (2, 4, 6)])
def test_the_network_takes_two_times_and_keeps_the_shape(network, size):
    z = torch.randn(2, 4, *size)
    assert network(z, torch.tensor([0.0, 0.3]), torch.tensor([1.0, 0.3])).shape == z.shape


@pytest.mark.gate("P3-T3")
def test_the_exact_derivative_runs_on_the_network(network, draws):
    z, tangent, r, t = draws
    du_dt = exact(network, z, r, t, tangent)
    assert du_dt.shape == z.shape
    assert torch.isfinite(du_dt).all()
    assert du_dt.any()


@pytest.mark.gate("P3-T4")
@pytest.mark.parametrize("prediction", ["u", "x"])
def test_the_raw_loss_per_element_is_plausible(network, draws, prediction):
    objective = Objective(network, ObjectiveConfig(prediction=prediction, loss_reduction="sum"))
    raw = objective(*draws).record["raw"]
    assert (raw / ELEMENTS > 0).all()
    assert (raw / ELEMENTS < 1000).all()


@pytest.mark.gate("P3-T5")
def test_gradients_reach_every_weight(network, draws):
    _, found = gradients(network, draws)
    assert [name for name, gradient in found.items() if gradient is None or not gradient.any()] == []


@pytest.mark.gate("P3-T6")
@pytest.mark.parametrize(("lp", "expected"), [(1.0, 5.0), (1.5, 9.0), (2.0, 17.0), (3.0, 65.0)])
def test_lp_by_hand(lp, expected):
    difference = torch.tensor([[[1.0, -4.0]]])
    assert lp_loss(difference, torch.zeros_like(difference), lp=lp).item() == pytest.approx(expected)


@pytest.mark.gate("P3-T7")
def test_ten_thousand_draws_follow_the_configured_distribution():
    config = TimesConfig(mean=-0.4, std=1.0, data_proportion=0)
    r, t = draw_times(0, "train", 0, 5000, config, ObjectiveConfig(prediction="u"))
    draws = torch.logit(torch.cat([r, t]).double())
    assert stats.kstest(draws.numpy(), stats.norm(-0.4, 1.0).cdf).pvalue > 0.05


@pytest.mark.gate("P3-T8")
def test_the_average_follows_the_network(network):
    average = WeightAverage(network, Constant(0.9))
    start = {name: value.clone() for name, value in average.weights.items()}
    doubled = MaisiUNet(
        4, channels=(8, 16), attention_levels=(False, True), head_channels=8, res_blocks=1, norm_groups=4
    )  # fmt: skip
    doubled.load_state_dict({name: 2 * value for name, value in network.state_dict().items()})
    for update in range(5):
        average.update(doubled, update + 1, batch=4)
    for name, value in average.weights.items():
        torch.testing.assert_close(value, start[name] * (2 - 0.9**5))


@pytest.mark.gate("P3-T9")
def test_the_combined_flow_matching_and_meanflow_loss_is_finite(network, draws):
    plain, _ = gradients(network, draws)
    combined, found = gradients(network, draws, fm_weight=1.0)
    assert combined > plain
    assert all(torch.isfinite(gradient).all() for gradient in found.values())


@pytest.mark.gate("P3-T10")
def test_under_bf16_the_loss_and_all_gradients_are_finite_and_near_float32(network):
    # oneDNN's bf16 weight gradient of a 3-D convolution is garbage on 2^3 voxels: the coarsest level here has 4^3.
    x, eps = torch.randn(2, 2, 4, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    draws = (x, eps, torch.tensor([0.2, 0.4]), torch.tensor([0.9, 0.4]))
    exact_loss, reference = gradients(network, draws)
    loss, found = gradients(network, draws, autocast=True)
    assert loss == pytest.approx(exact_loss, rel=0.05)
    for name, gradient in found.items():
        assert gradient is not None, name
        assert torch.isfinite(gradient).all(), name
    inner = sum((found[name] * reference[name]).sum() for name in found)
    lengths = [sum(g.square().sum() for g in group.values()).sqrt() for group in (found, reference)]
    assert inner / (lengths[0] * lengths[1]) > 0.95
