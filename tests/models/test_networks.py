from __future__ import annotations

import pytest
import torch
from torch import nn

from neuromf.errors import UserError
from neuromf.models.networks import build_network, check_latent_size, parameter_count
from neuromf.models.unet import MaisiUNet
from neuromf.models.wrappers import Padded, Patched

UNET = {
    "name": "maisi-unet",
    "channels": (4, 8),
    "attention_levels": (False, True),
    "head_channels": 4,
    "res_blocks": 1,
    "norm_groups": 4,
    "conditioning": "t+h",
    "time_scale": 1.0,
    "patch": 1,
    "pad": False,
    "v_head_blocks": 0,
    "classes": False,
    "guidance": False,
}
MIT = {
    "name": "mit",
    "size": None,
    "depth": 2,
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
    "v_head_blocks": 1,
    "classes": False,
    "guidance": False,
}


def test_frozen_parameters_are_not_counted():
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    assert parameter_count(layer) == 6


@pytest.mark.parametrize("settings", [UNET, {**UNET, "patch": 2}, MIT, MLP], ids=["unet", "patched", "mit", "mlp"])
def test_every_backbone_has_the_same_interface(settings):
    shape = (3, 4, 4, 4)
    settings = {**settings, "v_head_blocks": 1, "classes": True, "guidance": True}
    net = build_network(settings, shape, classes=5)
    z, r, t = torch.randn(2, *shape), torch.zeros(2), torch.ones(2)
    assert net(z, r, t).shape == z.shape
    assert [head.shape for head in net.heads(z, r, t, None)] == [z.shape, z.shape]
    assert parameter_count(net.without_v_head()) < parameter_count(net)
    left_to_adamw = [name for name in net.state_dict() if name.startswith(net.ADAMW_MODULES)]
    assert 0 < len(left_to_adamw) < len(net.state_dict())


def test_a_size_stands_for_depth_width_and_heads():
    with torch.device("meta"):
        named = build_network({**MIT, "size": "B", "patch": 4}, (4, 8, 8, 8))
        spelt = build_network({**MIT, "depth": 12, "width": 768, "heads": 12, "patch": 4}, (4, 8, 8, 8))
    shapes = lambda net: {name: value.shape for name, value in net.state_dict().items()}
    assert shapes(named) == shapes(spelt)


def test_classes_are_those_of_the_latents_where_they_are_asked_for():
    asked, not_asked = {**UNET, "classes": True}, UNET
    assert build_network(asked, (2, 4, 4, 4), classes=3).net.class_embedding.num_embeddings == 4
    assert not hasattr(build_network(not_asked, (2, 4, 4, 4), classes=3).net, "class_embedding")
    with pytest.raises(UserError, match="latents that carry classes"):
        build_network(asked, (2, 4, 4, 4))


def test_the_unet_is_patched_inside_and_padded_outside():
    net = build_network({**UNET, "patch": 2, "pad": True}, (2, 5, 3, 4))
    assert isinstance(net, Padded)
    assert isinstance(net.network, Patched)
    assert isinstance(net.network.network, MaisiUNet)
    assert net.rule == 4
    assert net(torch.randn(1, 2, 5, 3, 4), torch.zeros(1), torch.ones(1)).shape == (1, 2, 5, 3, 4)


def test_an_unknown_network_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="available: maisi-unet, mit, mlp"):
        build_network({**UNET, "name": "maisi-unnet"}, (4, 8, 8, 8))


def test_settings_the_layers_refuse_are_the_users_mistake():
    with pytest.raises(UserError, match="network"):
        build_network({**UNET, "norm_groups": 3}, (4, 8, 8, 8))


def test_sizes_that_fit_pass():
    deep = {**UNET, "channels": (4, 8, 8, 8)}
    check_latent_size(deep, (8, 16, 24))
    check_latent_size({**deep, "pad": True}, (5, 7, 9))
    check_latent_size({**UNET, "channels": (4,)}, (5, 7, 9))
    check_latent_size(MIT, (2, 4, 6))
    check_latent_size(MLP, (1, 1, 1))


def test_a_size_that_does_not_fit_is_refused_with_the_nearest_ones():
    with pytest.raises(UserError) as caught:
        check_latent_size({**UNET, "channels": (4, 8, 8), "patch": 2}, (12, 16, 3), factor=4)
    text = str(caught.value)
    assert "(12, 16, 3)" in text
    assert "multiple of 8" in text
    for nearest in ("(8, 16, 8)", "(16, 16, 8)", "(32, 64, 32)", "(64, 64, 32)", "network.pad=true"):
        assert nearest in text


def test_places_cover_the_patched_and_padded_grid():
    net = build_network({**UNET, "patch": 2, "pad": True, "places": True}, (2, 5, 3, 4))
    assert net.network.network.places.shape[1:] == (4, 2, 2)
    assert net(torch.randn(1, 2, 5, 3, 4), torch.zeros(1), torch.ones(1)).shape == (1, 2, 5, 3, 4)


def test_a_grid_that_patches_do_not_tile_is_refused_with_the_nearest_ones():
    with pytest.raises(UserError) as caught:
        check_latent_size({**MIT, "patch": 4}, (12, 10, 8), factor=4)
    assert "(12, 8, 8)" in str(caught.value)
    assert "(48, 48, 32)" in str(caught.value)
