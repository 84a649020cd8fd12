"""Ours against the tape-through-JVP way of the published codes: the same gradients, at a fraction of the memory.

The reference codes differentiate through the primal output of a JVP and stop the gradient at its tangent output. Here
the derivative is a pass of its own, without a tape, and an ordinary evaluation carries the gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from neuromf.config import ObjectiveConfig
from neuromf.losses.meanflow import weighted
from neuromf.models.mlp import MeanFlowMLP
from neuromf.models.unet import MaisiUNet
from neuromf.training.objective import Objective

T_MIN = 0.05
SETTINGS = {"norm_p": 0.7, "norm_eps": 0.3, "loss_reduction": "sum", "t_min": T_MIN}


def unet() -> MaisiUNet:
    """A MAISI U-Net with attention, in float64; zero-initialised weights are random too."""
    return randomised(
        MaisiUNet(4, channels=(8, 16), attention_levels=(False, True), head_channels=8, res_blocks=1, norm_groups=4)
    )


def mlp() -> MeanFlowMLP:
    """The network for points, with a second head."""
    return randomised(MeanFlowMLP((4, 2, 2, 2), width=12, depth=2, v_head_blocks=1))


def randomised(network: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    network.double()
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(0.15 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return network


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, eps, r, t, all with r < t; one t lies below the clamp."""
    generator = torch.Generator().manual_seed(1)
    x, eps = torch.randn(2, 3, 4, 2, 2, 2, generator=generator, dtype=torch.float64)
    times = {"dtype": torch.float64}
    return x, eps, torch.tensor([0.2, 0.0, 0.01], **times), torch.tensor([0.9, 1.0, 0.04], **times)


def per_sample(scalars: Tensor) -> Tensor:
    return scalars.reshape(-1, 1, 1, 1, 1)


def tape_gradients(network: nn.Module, batch: tuple[Tensor, ...], prediction: str, tangent: str) -> list[Tensor | None]:
    """The reference way, written out: one JVP with a tape, the gradient through its primal output."""
    x, eps, r, t = batch
    z = (1 - per_sample(t)) * x + per_sample(t) * eps

    def velocity(output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        return output if prediction == "u" else (z - output) / per_sample(t.clamp(min=T_MIN))

    u: Callable[..., Tensor] = lambda z_, r_, t_: velocity(network(z_, r_, t_), z_, t_)
    with torch.no_grad():
        if tangent == "v_c":
            along = eps - x
        elif tangent == "boundary":
            along = u(z, t, t)
        else:
            along = velocity(network.heads(z, t, t)[1], z, t)
    with sdpa_kernel(SDPBackend.MATH):
        value, du_dt = torch.func.jvp(u, (z, r, t), (along, torch.zeros_like(r), torch.ones_like(t)))
    assert value.requires_grad
    assert du_dt.requires_grad  # its tape is kept for nothing: the gradient stops here
    V = value + per_sample(t - r) * du_dt.detach()
    raw = (V - (eps - x)).square().flatten(1).sum(1)
    loss = weighted(raw, SETTINGS["norm_p"], SETTINGS["norm_eps"]).mean()
    if tangent == "v-head":
        raw_v = (velocity(network.heads(z, r, t)[1], z, t) - (eps - x)).square().flatten(1).sum(1)
        loss = loss + weighted(raw_v, SETTINGS["norm_p"], SETTINGS["norm_eps"]).mean()
    return torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)


CASES = [
    ("unet", "boundary", {"name": "imf"}),
    ("unet", "v_c", {"name": "meanflow"}),
    ("mlp", "v-head", {"name": "imf", "tangent": "v-head"}),
]


@pytest.mark.parametrize("prediction", ["u", "x"])
@pytest.mark.parametrize(("network", "tangent", "settings"), CASES)
def test_the_gradients_are_those_of_the_tape_to_rounding(batch, network, tangent, settings, prediction):
    network = unet() if network == "unet" else mlp()
    expected = tape_gradients(network, batch, prediction, tangent)
    objective = Objective(network, ObjectiveConfig(prediction=prediction, **settings, **SETTINGS))
    found = torch.autograd.grad(objective(*batch).value, list(network.parameters()), allow_unused=True)
    used = 0
    for name, ours, theirs in zip(dict(network.named_parameters()), found, expected, strict=True):
        assert (ours is None) == (theirs is None), name
        if ours is not None and theirs.any():
            assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max(), name
            used += 1
    assert used > 0.9 * len(found)
