from __future__ import annotations

import pytest
import torch
from torch import nn

from neuromf.config import ObjectiveConfig
from neuromf.models.blocks import blocks_of, recompute_blocks
from neuromf.models.networks import build_network
from neuromf.training.objective import Objective

SHAPE = (2, 8, 8, 8)
NETWORKS = {
    "maisi-unet": {"name": "maisi-unet", "channels": (8, 16), "attention_levels": (False, True), "head_channels": 8,
                   "norm_groups": 8, "res_blocks": 1, "v_head_blocks": 1},
    "mit": {"name": "mit", "size": None, "depth": 3, "width": 24, "heads": 2, "patch": 4, "v_head_blocks": 1},
}  # fmt: skip


def objective(name: str) -> Objective:
    torch.manual_seed(0)
    return Objective(build_network(NETWORKS[name], SHAPE), ObjectiveConfig(tangent="v-head"))


def step(of: Objective) -> tuple[float, dict[str, torch.Tensor], int]:
    """Loss, gradients, and how many numbers were kept for the backward pass."""
    generator = torch.Generator().manual_seed(1)
    x, eps = (torch.randn(3, *SHAPE, generator=generator) for _ in range(2))
    kept = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += 0 if isinstance(tensor, nn.Parameter) else tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = of(x, eps, torch.tensor([0.0, 0.2, 0.5]), torch.tensor([1.0, 0.6, 0.5])).value
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in of.named_parameters()}, kept


@pytest.mark.parametrize("name", NETWORKS)
def test_recomputing_blocks_keeps_less_and_changes_nothing(name):
    loss, grads, kept = step(objective(name))
    other = objective(name)
    assert recompute_blocks(other.network) == len(blocks_of(other.network)) > 3
    loss_again, grads_again, kept_again = step(other)
    assert loss_again == loss
    for key, grad in grads.items():
        torch.testing.assert_close(grads_again[key], grad, rtol=1e-5, atol=1e-7)
    assert kept_again < 0.5 * kept


@pytest.mark.parametrize("name", NETWORKS)
def test_names_of_weights_stay(name):
    plain, other = objective(name), objective(name)
    recompute_blocks(other.network)
    assert list(plain.state_dict()) == list(other.state_dict())


def test_a_plain_network_of_points_has_no_blocks():
    assert recompute_blocks(build_network({"name": "mlp", "width": 8, "depth": 2}, (4, 1, 1, 1))) == 0
