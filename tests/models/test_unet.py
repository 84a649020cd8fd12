from __future__ import annotations

import math

import pytest
import torch

from neuromf.conditions import Condition
from neuromf.losses.derivative import exact
from neuromf.models.networks import parameter_count
from neuromf.models.unet import MaisiUNet, sinusoid

SMALL = {"channels": (4, 8), "attention_levels": (False, True), "head_channels": 4, "res_blocks": 1, "norm_groups": 4}
EVERYTHING = {"conditioning": "r+t", "v_head_blocks": 2, "classes": 3, "guidance": True, "spacing_mm": (1.0, 1.0, 2.0)}

FLOW = 178_566_276  # one time embedding
SECOND_TIME = 82_432
NVIDIA = 180_500_868  # FLOW, 128 contrasts and the spacing
PUBLISHED = [
    ({"conditioning": "h"}, FLOW),
    ({"conditioning": "t"}, FLOW),
    ({"conditioning": "decoupled"}, FLOW),
    ({"conditioning": "t+h"}, FLOW + SECOND_TIME),
    ({"conditioning": "r+t"}, FLOW + SECOND_TIME),
    ({"conditioning": "h", "v_head_blocks": 1}, FLOW + 221_568 + 7_044),  # a block, and norm and convolution
    ({"conditioning": "t", "classes": 127, "spacing_mm": (1.0, 1.0, 1.0)}, NVIDIA),
    ({"conditioning": "t+h", "classes": 127, "spacing_mm": (1.0, 1.0, 1.0)}, NVIDIA + SECOND_TIME),
]


def small(**settings) -> MaisiUNet:
    """A tiny network in float64 whose weights, the zero-initialised ones too, are random."""
    torch.manual_seed(0)
    net = MaisiUNet(2, **{**SMALL, **settings}).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.3 * torch.randn_like(p))
    return net


@pytest.fixture
def point() -> tuple[torch.Tensor, ...]:
    """z (B == C), r, t and a tangent."""
    z, tangent = torch.randn(2, 2, 2, 4, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return z, *torch.tensor([[0.1, 0.4], [0.5, 0.9]], dtype=torch.float64), tangent


def conditions() -> Condition:
    interval = torch.tensor([[0.1, 0.9], [0.3, 0.7]], dtype=torch.float64)
    return Condition(torch.tensor([0, 3]), torch.tensor([1.5, 4.0], dtype=torch.float64), interval)


@pytest.mark.parametrize(("settings", "count"), PUBLISHED)
def test_the_published_size_has_the_published_number_of_parameters(settings, count):
    with torch.device("meta"):
        net = MaisiUNet(4, **settings)
    assert parameter_count(net) == count


def test_the_embedding_is_cosines_then_sines_of_geometric_frequencies():
    t = torch.tensor([0.0, 0.37], dtype=torch.float64)
    found = sinusoid(t, 4)
    assert found.dtype == torch.float64
    assert found[0].tolist() == [1, 1, 0, 0]
    expected = [math.cos(0.37), math.cos(0.0037), math.sin(0.37), math.sin(0.0037)]
    assert found[1].tolist() == pytest.approx(expected, abs=1e-15)


# --- times -----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("conditioning", ["t+h", "r+t", "h", "t", "decoupled"])
def test_times_are_real_numbers_and_felt_as_the_conditioning_says(conditioning, point):
    net, z = small(conditioning=conditioning), point[0][:1]
    at = lambda r, t: net(z, torch.tensor([r], dtype=torch.float64), torch.tensor([t], dtype=torch.float64))
    assert not torch.equal(at(0.2, 0.5), at(0.2, 0.5 + 1e-9))
    assert torch.equal(at(0.2, 0.5), at(0.2 + 1e-9, 0.5)) == (conditioning == "t")
    same_gap = torch.allclose(at(0.2, 0.5), at(0.4, 0.7), rtol=1e-9, atol=1e-9)
    assert same_gap == (conditioning == "h")


@torch.no_grad()
def test_a_decoupled_network_is_a_flow_model_with_another_time_for_its_decoder(point):
    z, r, t, _ = point
    flow, decoupled = small(conditioning="t"), small(conditioning="decoupled")
    decoupled.load_state_dict(flow.state_dict())
    assert torch.equal(decoupled(z, t, t), flow(z, r, t))
    for name, weight in decoupled.named_parameters():
        if name.startswith("net.up_blocks") and "time_emb_proj" in name:
            weight.zero_()  # a deaf decoder: no r
    assert torch.equal(decoupled(z, r, t), decoupled(z, 2 * r, t))


@torch.no_grad()
def test_the_time_scale_multiplies_all_times_and_the_t_scale_one(point):
    z, r, t, _ = point
    plain = small()
    torch.testing.assert_close(small(time_scale=10.0)(z, r / 10, t / 10), plain(z, r, t), rtol=1e-12, atol=1e-12)
    flow = small(conditioning="t")
    torch.testing.assert_close(small(conditioning="t", t_scale=10.0)(z, r, t / 10), flow(z, r, t))
    both = small(conditioning="r+t", t_scale=10.0)  # r by its own branch, unscaled
    torch.testing.assert_close(both(z, r, t / 10), small(conditioning="r+t")(z, r, t), rtol=1e-12, atol=1e-12)


def test_a_scale_of_t_needs_t():
    with pytest.raises(ValueError, match="use time_scale"):
        MaisiUNet(2, **SMALL, conditioning="h", t_scale=1000.0)


# --- conditions ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_nothing_given_means_no_class_and_no_guidance(point):
    z, r, t, _ = point
    net = small(**EVERYTHING)
    ones = torch.ones(2)
    explicit = Condition(torch.tensor([3, 3]), ones, torch.stack([0 * ones, ones], dim=1))
    assert torch.equal(net(z, r, t), net(z, r, t, explicit))
    assert torch.equal(net(z, r, t), net(z, r, t, Condition()))


@torch.no_grad()
def test_every_condition_is_felt(point):
    z, r, t, _ = point
    net, base = small(**EVERYTHING), conditions()
    others = [
        base._replace(label=torch.tensor([1, 3])),
        base._replace(omega=base.omega + torch.tensor([1e-6, 0])),
        base._replace(interval=base.interval + torch.tensor([[1e-6, 0], [0, 0]])),
        base._replace(interval=base.interval + torch.tensor([[0, 1e-6], [0, 0]])),
    ]
    reference = net(z, r, t, base)
    for other in others:
        changed = (net(z, r, t, other) - reference).flatten(1).abs().amax(1)
        assert changed[0] > 1e-9
        assert changed[1] == 0


@torch.no_grad()
def test_conditions_a_network_was_not_built_for_are_left_alone(point):
    z, r, t, _ = point
    assert torch.equal(small()(z, r, t, conditions()), small()(z, r, t))


@torch.no_grad()
def test_the_guidance_enters_as_one_minus_its_inverse(point):
    z, r, t, _ = point
    net = small(guidance=True)
    seen = []
    net.guidance_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    net(z, r, t, Condition(omega=torch.tensor([1.0, 4.0])))
    width = 4
    torch.testing.assert_close(seen[0][:, :width], sinusoid(torch.tensor([0.0, 0.75], dtype=torch.float64), width))
    torch.testing.assert_close(seen[0][:, 2 * width :], sinusoid(torch.ones(2, dtype=torch.float64), width))


@torch.no_grad()
def test_the_spacing_is_told_in_hundredths_and_is_no_weight(point):
    z, r, t, _ = point
    fine, coarse = small(spacing_mm=(1.0, 1.0, 1.0)), small(spacing_mm=(1.0, 1.0, 3.0))
    assert fine.spacing.tolist() == [100, 100, 100]
    assert fine.state_dict().keys() == coarse.state_dict().keys()
    assert "spacing" not in fine.state_dict()
    assert not torch.allclose(fine(z, r, t), coarse(z, r, t))


def test_fresh_guidance_has_no_effect():
    net = MaisiUNet(2, **SMALL, guidance=True)
    torch.nn.init.normal_(net.net.out[-1].conv.weight)
    z, r, t = torch.randn(2, 2, 4, 4, 4), torch.tensor([0.1, 0.2]), torch.tensor([0.5, 0.6])
    assert torch.equal(net(z, r, t), net(z, r, t, Condition(omega=torch.tensor([2.0, 8.0]))))


# --- the v-head ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_v_head_stands_beside_the_output_and_can_be_left_out(point):
    z, r, t, _ = point
    net = small(**EVERYTHING)
    before = set(net.state_dict())
    u, v = net.heads(z, r, t, conditions())
    bare = net.without_v_head()
    assert torch.equal(u, net(z, r, t, conditions()))
    assert torch.equal(u, bare(z, r, t, conditions()))
    assert not torch.allclose(u, v)
    assert before - set(bare.state_dict()) == {name for name in before if name.startswith("v_head.")}
    assert before == set(net.state_dict())
    bare.net.out[-1].conv.weight.zero_()
    assert torch.equal(u, net(z, r, t, conditions()))  # a copy


def test_the_loss_of_the_v_head_reaches_the_shared_features():
    net = small(v_head_blocks=1).float()
    net.heads(torch.randn(1, 2, 4, 4, 4), torch.zeros(1), torch.ones(1))[1].square().sum().backward()
    without = {name for name, p in net.named_parameters() if p.grad is None}
    assert without == {name for name in net.state_dict() if name.startswith("net.out.")}


def test_asking_a_network_for_a_head_it_lacks_is_an_error():
    with pytest.raises(ValueError, match="v_head_blocks=0"):
        small().heads(torch.randn(1, 2, 4, 4, 4).double(), torch.zeros(1), torch.ones(1))


# --- the whole network -----------------------------------------------------------------------------------------

VARIANTS = {
    **{name: {"conditioning": name} for name in ("t+h", "r+t", "h", "t", "decoupled")},
    "classes": {"classes": 3},
    "guidance": {"guidance": True},
    "everything": EVERYTHING,
    "nvidia": {"conditioning": "t+h", "t_scale": 1000.0, "classes": 3, "spacing_mm": (1.0, 1.0, 1.0)},
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
def test_the_exact_derivative_matches_a_central_difference(settings, point):
    z, r, t, tangent = point
    net, told = small(**settings), conditions()

    def both(z_, r_, t_):
        return torch.stack(net.heads(z_, r_, t_, told) if net.v_head else [net(z_, r_, t_, told)])

    found = exact(both, z, r, t, tangent)
    d = 1e-5 / settings.get("t_scale", 1.0)
    with torch.no_grad():
        expected = (both(z + d * tangent, r, t + d) - both(z - d * tangent, r, t - d)) / (2 * d)
        along_t = (both(z, r, t + d) - both(z, r, t - d)) / (2 * d)
    assert along_t.abs().max() > 1e-3  # time is felt
    assert (found - expected).norm() / expected.norm() < 1e-6


@torch.no_grad()
def test_samples_of_a_batch_do_not_see_each_other(point):
    z, r, t, _ = point
    net, told = small(**EVERYTHING), conditions()
    one = lambda i: (z[i : i + 1], r[i : i + 1], t[i : i + 1], told.select(torch.tensor([i])))
    alone = [torch.cat(parts) for parts in zip(*(net.heads(*one(i)) for i in range(2)), strict=True)]
    torch.testing.assert_close(list(net.heads(z, r, t, told)), alone, rtol=1e-10, atol=1e-10)


def test_a_fresh_network_answers_zero():
    net = MaisiUNet(2, **SMALL, v_head_blocks=1)
    for answer in net.heads(torch.randn(1, 2, 4, 4, 4), torch.zeros(1), torch.ones(1)):
        assert (answer == 0).all()


def test_levels_need_not_attend_though_the_middle_always_does():
    net = small(attention_levels=(False, False)).float()
    assert net(torch.randn(1, 2, 4, 4, 4), torch.zeros(1), torch.ones(1)).shape == (1, 2, 4, 4, 4)
    assert [name for name, _ in net.named_modules() if name.endswith("middle_block.attention.attn")]


@torch.no_grad()
def test_places_are_silent_at_first_and_then_say_where_a_cell_lies(point):
    z, r, t, _ = point
    plain, net = small(), small(grid=(4, 4, 4))
    net.load_state_dict({**plain.state_dict(), "places": torch.zeros_like(net.places)})
    told = net(z, r, t)
    assert torch.equal(told, plain(z, r, t))
    net.places[:, 0, 0, 0] = 3.0
    change = (net(z, r, t) - told).abs().amax(dim=(0, 1))
    assert change[0, 0, 0] > 2 * change[3, 3, 3]


def test_embeddings_and_the_first_and_last_layers_are_left_to_adamw():
    names = list(small(**EVERYTHING).state_dict())
    for prefix in MaisiUNet.ADAMW_MODULES:
        assert prefix == "places" or any(name.startswith(prefix + ".") for name in names)
    muon = [name for name in names if not name.startswith(MaisiUNet.ADAMW_MODULES)]
    assert {name.split(".")[0] for name in muon} == {"net", "v_head"}
    parts = {name.split(".")[1] for name in muon}
    assert parts == {"down_blocks", "middle_block", "up_blocks", "blocks"}
