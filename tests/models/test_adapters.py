"""Adapters start as the base, train alone, and merge to the same answer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from neuromf.errors import UserError
from neuromf.models.adapters import Adapters, frozen_count, load_base, merge
from neuromf.models.networks import build_network, parameter_count

IMAGE, MASK = 4, 3
UNET = {
    "name": "maisi-unet",
    "channels": (16, 32),
    "attention_levels": (False, True),
    "head_channels": 16,
    "res_blocks": 1,
    "norm_groups": 8,
    "pad": False,
}
MIT = {"name": "mit", "size": None, "depth": 2, "width": 48, "heads": 4, "patch": 2, "v_head_blocks": 0}
NETWORKS = {
    "unet": (UNET, (8, 8, 8)),
    "patched, preconditioned": ({**UNET, "patch": 2, "precondition": True}, (8, 8, 8)),
    "padded": ({**UNET, "pad": True, "places": True}, (7, 6, 8)),
    "mit": (MIT, (4, 4, 4)),
}
BOTH = ("attention", "blocks")


def randomised(network: nn.Module) -> nn.Module:
    """Fresh networks answer zero; trained ones do not."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return network


def pair(name: str, targets: tuple[str, ...] = BOTH) -> tuple[nn.Module, nn.Module, Tensor]:
    """A base, the same base adapted, and a latent of all channels; in float64."""
    settings, grid = NETWORKS[name]
    base = randomised(build_network(settings, (IMAGE, *grid))).double()
    adapted = build_network(settings, (IMAGE + MASK, *grid), adapters=Adapters(MASK, 4, 8.0, targets)).double()
    load_base(adapted, base.state_dict())
    return base, adapted, torch.randn(2, IMAGE + MASK, *grid, dtype=torch.float64)


def times() -> tuple[Tensor, Tensor]:
    return torch.tensor([0.0, 0.3]).double(), torch.tensor([1.0, 0.8]).double()


@pytest.mark.gate("P7-T2")
@pytest.mark.parametrize("name", NETWORKS)
def test_the_image_s_answer_is_the_base_s_before_the_first_step(name: str) -> None:
    base, adapted, z = pair(name)
    made, known = adapted(z, *times())[:, :IMAGE], base(z[:, :IMAGE], *times())
    torch.testing.assert_close(made, known, rtol=1e-12, atol=1e-13)


def test_a_fresh_mask_is_answered_by_zero() -> None:
    _, adapted, z = pair("unet")
    assert torch.count_nonzero(adapted(z, *times())[:, IMAGE:]) == 0


@pytest.mark.gate("P7-T3")
@pytest.mark.parametrize("name", NETWORKS)
def test_adapters_and_new_channels_alone_are_parameters(name: str) -> None:
    base, adapted, _ = pair(name)
    names = [name for name, _ in adapted.named_parameters()]
    assert all("lora_" in name or ".new." in name for name in names)
    assert adapted.state_dict().keys() == set(names)
    assert frozen_count(adapted) == parameter_count(base)


@pytest.mark.gate("P7-T3")
@pytest.mark.parametrize("name", ["unet", "mit"])
def test_a_step_changes_all_that_is_learned_and_nothing_of_the_base(name: str) -> None:
    base, adapted, z = pair(name)
    before = copy.deepcopy(adapted.state_dict())
    optimizer = torch.optim.SGD(adapted.parameters(), lr=1e-2)
    for _ in range(2):  # B is zero at first, so that A has no gradient in the first step
        optimizer.zero_grad()
        (adapted(z, *times()) - torch.randn_like(z)).square().mean().backward()
        optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in adapted.state_dict().items())
    again = build_network(NETWORKS[name][0], (IMAGE + MASK, *NETWORKS[name][1]), adapters=Adapters(MASK, 4, 8.0, BOTH))
    load_base(again.double(), base.state_dict())
    kept = dict(again.named_buffers())
    assert all(torch.equal(value, kept[name]) for name, value in adapted.named_buffers())


@pytest.mark.parametrize("name", NETWORKS)
def test_merged_is_a_plain_network_with_the_same_answer(name: str) -> None:
    _, adapted, z = pair(name)
    randomised(adapted)
    before = copy.deepcopy(adapted.state_dict())
    settings, grid = NETWORKS[name]
    plain = merge(adapted, build_network(settings, (IMAGE + MASK, *grid)).double())
    torch.testing.assert_close(plain(z, *times()), adapted(z, *times()), rtol=1e-9, atol=1e-10)
    assert not any("lora" in name for name in plain.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())


def test_the_derivative_goes_through_adapters_exactly() -> None:
    _, adapted, z = pair("unet")
    randomised(adapted)
    r, t = times()
    direction = torch.randn_like(z)

    def u(z: Tensor, t: Tensor) -> Tensor:
        return adapted(z, r, t)

    with torch.no_grad():
        _, exact = torch.func.jvp(u, (z, t), (direction, torch.ones_like(t)))
        step = 1e-5
        difference = (u(z + step * direction, t + step) - u(z - step * direction, t - step)) / (2 * step)
    torch.testing.assert_close(exact, difference, rtol=1e-5, atol=1e-6)


def test_attention_alone_is_less_than_attention_and_blocks() -> None:
    _, small, _ = pair("unet", ("attention",))
    _, large, _ = pair("unet")
    assert 0 < parameter_count(small) < parameter_count(large)


def test_at_rank_8_the_published_network_grows_by_less_than_five_percent() -> None:
    settings = {"name": "maisi-unet", "channels": (64, 128, 256, 512), "attention_levels": (False, False, True, True)}
    settings |= {"head_channels": 32, "res_blocks": 2, "norm_groups": 32}
    with torch.device("meta"):
        adapted = build_network(settings, (8, 48, 48, 48), adapters=Adapters(4, 8, 16.0, ("attention",)))
    assert frozen_count(adapted) > 178e6
    assert parameter_count(adapted) < 0.01 * frozen_count(adapted)


def test_another_base_is_refused() -> None:
    base, adapted, _ = pair("unet")
    other = {name: value for name, value in base.state_dict().items() if "conv_in" not in name}
    with pytest.raises(UserError, match=r"does not fit[\s\S]*missing"):
        load_base(adapted, other)


def test_a_network_without_a_place_for_adapters_is_refused() -> None:
    with pytest.raises(UserError, match="takes no adapters"):
        build_network({"name": "mlp"}, (5, 1, 1, 1), adapters=Adapters(1))
