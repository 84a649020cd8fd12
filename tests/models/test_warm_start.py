from __future__ import annotations

import pytest
import torch

from neuromf.conditions import Condition
from neuromf.errors import UserError
from neuromf.models.networks import build_network
from neuromf.models.warm_start import convert

SHAPE = (2, 4, 4, 4)
FLOW = {
    "name": "maisi-unet",
    "channels": (4, 8),
    "attention_levels": (False, True),
    "head_channels": 4,
    "res_blocks": 1,
    "norm_groups": 4,
    "conditioning": "t",
    "time_scale": 1.0,
    "patch": 1,
    "pad": False,
    "v_head_blocks": 0,
    "classes": False,
    "guidance": False,
}
TWO_TIMES = {**FLOW, "conditioning": "t+h"}
MIT = {
    "name": "mit",
    "size": None,
    "depth": 3,
    "width": 24,
    "heads": 2,
    "patch": 2,
    "time_token": False,
    "v_head_blocks": 1,
    "classes": False,
    "guidance": False,
}
MLP = {
    "name": "mlp",
    "width": 16,
    "depth": 2,
    "conditioning": "t+h",
    "v_head_blocks": 0,
    "classes": False,
    "guidance": False,
}


def trained(settings, classes: int = 0) -> torch.nn.Module:
    """A network in float64 with random weights everywhere, as training would leave it."""
    torch.manual_seed(0)
    network = build_network(settings, SHAPE, classes).double()
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(0.3 * torch.randn_like(p))
    return network


def converted(old: torch.nn.Module, source, target, classes: int = 0) -> torch.nn.Module:
    torch.manual_seed(1)
    network = build_network(target, SHAPE, classes).double()
    network.load_state_dict(convert(old.state_dict(), source, network, target))
    return network


@pytest.fixture
def point() -> tuple[torch.Tensor, ...]:
    z = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return z, *torch.tensor([[0.1, 0.4], [0.5, 0.9]], dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("settings", [TWO_TIMES, {**TWO_TIMES, "patch": 2, "pad": True, "v_head_blocks": 1}, MIT])
def test_the_same_network_takes_the_weights_as_they_are(settings, point):
    old = trained(settings)
    new = converted(old, {**settings, "patch": settings["patch"]}, settings)
    assert torch.equal(new(*point), old(*point))
    assert all(torch.equal(value, old.state_dict()[name]) for name, value in new.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("conditioning", ["t+h", "r+t"])
def test_a_second_time_changes_a_flow_model_nowhere(conditioning, point):
    z, r, t = point
    old = trained(FLOW)
    new = converted(old, FLOW, {**FLOW, "conditioning": conditioning})
    assert torch.equal(new(z, r, t), old(z, r, t))
    assert torch.equal(new(z, t, t), old(z, t, t))


def test_a_second_time_can_learn_from_its_first_step_on(point):
    z, r, t = point
    new = converted(trained(FLOW), FLOW, TWO_TIMES)
    new(z, r, t).square().sum().backward()
    assert new.second_embed[2].weight.grad.abs().max() > 1e-6
    with torch.no_grad():
        new.second_embed[2].weight -= new.second_embed[2].weight.grad
        assert not torch.allclose(new(z, r, t), new(z, t, t))


@torch.no_grad()
def test_a_decoupled_network_is_the_flow_model_where_both_times_are_equal(point):
    z, r, t = point
    old = trained(FLOW)
    new = converted(old, FLOW, {**FLOW, "conditioning": "decoupled"})
    assert torch.equal(new(z, t, t), old(z, t, t))
    assert not torch.allclose(new(z, r, t), old(z, r, t))


@torch.no_grad()
def test_whatever_is_added_to_the_unet_has_no_effect_at_first(point):
    z, r, t = point
    old = trained(FLOW)
    target = {**TWO_TIMES, "v_head_blocks": 2, "classes": True, "guidance": True}
    new = converted(old, FLOW, target, classes=3)
    interval = torch.tensor([[0.2, 0.8], [0.0, 0.5]])
    told = Condition(torch.tensor([1, 3]), torch.tensor([4.0, 2.0]), interval)
    assert torch.equal(new(z, r, t, told), old(z, r, t))
    assert torch.equal(new.heads(z, r, t, told)[0], old(z, r, t))


@torch.no_grad()
def test_classes_added_to_the_mlp_have_no_effect_at_first(point):
    old = trained(MLP)
    new = converted(old, MLP, {**MLP, "classes": True}, classes=3)
    assert torch.equal(new(*point, Condition(torch.tensor([1, 3]))), old(*point))


@torch.no_grad()
@pytest.mark.parametrize("settings", [TWO_TIMES, MIT, MLP])
@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0)])
def test_a_v_head_comes_and_goes_without_touching_u(settings, before, after, point):
    source, target = {**settings, "v_head_blocks": before}, {**settings, "v_head_blocks": after}
    old = trained(source)
    new = converted(old, source, target)
    torch.testing.assert_close(new(*point), old(*point), rtol=1e-12, atol=1e-12)
    if before:
        assert torch.equal(new(*point), old.without_v_head()(*point))


@torch.no_grad()
def test_padding_may_change_and_renames_the_weights(point):
    z, r, t = point
    source = {**FLOW, "patch": 2, "v_head_blocks": 1}
    old = trained(source)
    new = converted(old, source, {**source, "pad": True, "v_head_blocks": 0, "conditioning": "t+h"})
    assert torch.equal(new(z, r, t), old(z, r, t))
    assert all(name.startswith("network.network.") for name in new.state_dict())


def test_settings_from_a_file_equal_settings_from_python():
    old = trained(FLOW)
    converted(old, {**FLOW, "channels": [4, 8], "attention_levels": [False, True]}, FLOW)


def test_the_weights_of_the_source_are_left_as_they_were(point):
    old = trained(FLOW)
    before = {name: value.clone() for name, value in old.state_dict().items()}
    new = converted(old, FLOW, TWO_TIMES)
    with torch.no_grad():
        for p in new.parameters():
            p.zero_()
    assert all(torch.equal(value, before[name]) for name, value in old.state_dict().items())


REFUSED = {
    "size": ({**TWO_TIMES, "channels": (4, 4)}, TWO_TIMES, r"channels: \(4, 4\) there, \(4, 8\) here"),
    "two settings": (
        {**TWO_TIMES, "res_blocks": 2, "time_scale": 9.0},
        TWO_TIMES,
        r"res_blocks: 2 there, 1 here\n  time_scale",
    ),
    "a lost time": (TWO_TIMES, FLOW, "conditioning: 't\\+h' there, 't' here"),
    "another second time": (TWO_TIMES, {**FLOW, "conditioning": "r+t"}, "conditioning"),
    "another v-head": ({**FLOW, "v_head_blocks": 1}, {**FLOW, "v_head_blocks": 2}, "v_head_blocks: 1 there, 2 here"),
    "lost guidance": ({**FLOW, "guidance": True}, FLOW, "guidance: True there, False here"),
    "guidance as tokens": (MIT, {**MIT, "guidance": True}, "guidance: False there, True here"),
    "guidance as columns": (MLP, {**MLP, "guidance": True}, "guidance: False there, True here"),
    "another patch": ({**FLOW, "patch": 2}, FLOW, "patch: 2 there, 1 here"),
}


@pytest.mark.parametrize(("source", "target", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_other_networks_are_refused_with_what_differs_and_what_is_allowed(source, target, message):
    with pytest.raises(UserError, match=message) as caught:
        converted(trained(source), source, target)
    assert "may become 't+h', 'r+t' or 'decoupled'" in caught.value.hint


def test_of_another_kind_of_network_only_the_kind_is_named():
    with pytest.raises(UserError) as caught:
        converted(trained(MIT), MIT, FLOW)
    assert caught.value.message.splitlines()[1:] == ["  name: 'mit' there, 'maisi-unet' here"]


def test_weights_that_do_not_fit_their_settings_are_listed():
    old = trained(FLOW)
    state = old.state_dict()
    del state["net.conv_in.conv.bias"]
    state["net.extra"] = torch.zeros(1)
    state["net.out.0.bias"] = torch.zeros(5)
    network = build_network(FLOW, SHAPE)
    with pytest.raises(UserError) as caught:
        convert(state, FLOW, network, FLOW)
    assert "missing (1): net.conv_in.conv.bias" in caught.value.message
    assert "not known (1): net.extra" in caught.value.message
    assert "other shape (1): net.out.0.bias (5,) instead of (4,)" in caught.value.message


def test_another_number_of_classes_is_refused_by_its_table():
    settings = {**FLOW, "classes": True}
    with pytest.raises(UserError, match=r"class_embedding\.weight \(4, 16\) instead of \(3, 16\)"):
        converted(trained(settings, classes=3), settings, settings, classes=2)
