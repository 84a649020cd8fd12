from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from neuromf.errors import UserError
from neuromf.models.unet import MaisiUNet, Padded, build_network, check_latent_size, parameter_count, sinusoid

PUBLISHED = {"h": 178_566_276, "t+h": 178_648_708, "r+t": 178_648_708}
SMALL = {"channels": (4, 8), "attention_levels": (False, True), "head_channels": 4, "res_blocks": 1, "norm_groups": 4}


def small(**settings) -> MaisiUNet:
    """A tiny network whose weights, the zero-initialised ones too, are random."""
    torch.manual_seed(0)
    net = MaisiUNet(2, **{**SMALL, **settings})
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.3 * torch.randn_like(p))
    return net


@pytest.mark.parametrize(("conditioning", "count"), PUBLISHED.items())
def test_the_published_size_has_the_published_number_of_parameters(conditioning, count):
    with torch.device("meta"):
        net = build_network("maisi-unet", 4, conditioning=conditioning)
    assert parameter_count(net) == count


def test_frozen_parameters_are_not_counted():
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    assert parameter_count(layer) == 6


def test_the_embedding_is_cosines_then_sines_of_geometric_frequencies():
    t = torch.tensor([0.0, 0.37], dtype=torch.float64)
    found = sinusoid(t, 4)
    assert found.dtype == torch.float64
    assert found[0].tolist() == [1, 1, 0, 0]
    expected = [math.cos(0.37), math.cos(0.0037), math.sin(0.37), math.sin(0.0037)]
    assert found[1].tolist() == pytest.approx(expected, abs=1e-15)


@torch.no_grad()
@pytest.mark.parametrize("conditioning", ["t+h", "r+t", "h"])
def test_times_are_real_numbers_and_both_are_felt(conditioning):
    net, z = small(conditioning=conditioning).double(), torch.randn(1, 2, 4, 4, 4, dtype=torch.float64)
    at = lambda r, t: net(z, torch.tensor([r], dtype=torch.float64), torch.tensor([t], dtype=torch.float64))
    assert not torch.equal(at(0.2, 0.5), at(0.2, 0.5 + 1e-9))
    assert not torch.equal(at(0.2, 0.5), at(0.2 + 1e-9, 0.5))
    same_gap = torch.allclose(at(0.2, 0.5), at(0.4, 0.7), rtol=1e-9, atol=1e-9)
    assert same_gap == (conditioning == "h")


@torch.no_grad()
def test_the_time_scale_multiplies_the_times():
    plain, scaled = small(), small(time_scale=10.0)
    z, r, t = torch.randn(2, 2, 4, 4, 4), torch.tensor([0.01, 0.02]), torch.tensor([0.05, 0.09])
    torch.testing.assert_close(scaled(z, r, t), plain(z, 10 * r, 10 * t))


@torch.no_grad()
def test_samples_of_a_batch_do_not_see_each_other():
    net, z = small(), torch.randn(2, 2, 4, 4, 4)  # B == C
    r, t = torch.tensor([0.1, 0.3]), torch.tensor([0.9, 0.4])
    alone = torch.cat([net(z[i : i + 1], r[i : i + 1], t[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(net(z, r, t), alone, rtol=1e-4, atol=1e-5)


def test_a_fresh_network_answers_zero():
    net = MaisiUNet(2, **SMALL)
    assert (net(torch.randn(1, 2, 4, 4, 4), torch.zeros(1), torch.ones(1)) == 0).all()


class Recorder(nn.Module):
    def forward(self, z, r, t):
        self.seen = z.shape
        return 2 * z


@pytest.mark.parametrize(("size", "padded"), [((4, 4, 4), (4, 4, 4)), ((5, 3, 6), (8, 4, 8)), ((1, 2, 9), (4, 4, 12))])
def test_padding_reaches_the_next_allowed_size_and_is_cropped_away(size, padded):
    z, inner = torch.randn(2, 3, *size), Recorder()
    assert torch.equal(Padded(inner, 4)(z, None, None), 2 * z)
    assert inner.seen == (2, 3, *padded)


def test_a_padded_unet_takes_any_size():
    net = build_network("maisi-unet", 2, pad=True, **SMALL)
    assert isinstance(net, Padded)
    assert net(torch.randn(1, 2, 5, 3, 4), torch.zeros(1), torch.ones(1)).shape == (1, 2, 5, 3, 4)


def test_sizes_that_fit_pass():
    check_latent_size((8, 16, 24), levels=4)
    check_latent_size((5, 7, 9), levels=1)


def test_a_size_that_does_not_fit_is_refused_with_the_nearest_ones():
    with pytest.raises(UserError) as caught:
        check_latent_size((12, 16, 3), levels=4, factor=4)
    text = str(caught.value)
    assert "(12, 16, 3)" in text
    assert "multiple of 8" in text
    for nearest in ("(8, 16, 8)", "(16, 16, 8)", "(32, 64, 32)", "(64, 64, 32)", "network.pad=true"):
        assert nearest in text


def test_levels_need_not_attend_though_the_middle_always_does():
    net = small(attention_levels=(False, False))
    assert net(torch.randn(1, 2, 4, 4, 4), torch.zeros(1), torch.ones(1)).shape == (1, 2, 4, 4, 4)
    assert [name for name, _ in net.named_modules() if name.endswith("middle_block.attention.attn")]


def test_an_unknown_network_is_refused_with_the_known_one():
    with pytest.raises(UserError, match="available: maisi-unet"):
        build_network("maisi-unnet", 4)


def test_settings_the_layers_refuse_are_the_users_mistake():
    with pytest.raises(UserError, match="network"):
        build_network("maisi-unet", 4, **{**SMALL, "norm_groups": 3})
