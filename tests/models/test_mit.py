from __future__ import annotations

import itertools

import pytest
import torch

from neuromf.conditions import Condition
from neuromf.errors import UserError
from neuromf.losses.derivative import exact
from neuromf.models.mit import (
    SIZES,
    MeanFlowTransformer,
    check_token_grid,
    from_tokens,
    rotate,
    rotation_angles,
    swiglu_width,
    to_tokens,
)
from neuromf.models.networks import parameter_count

GRID = (4, 2, 6)
SMALL = {"depth": 3, "width": 16, "heads": 2, "patch": 2, "v_head_blocks": 1}
CONDITIONED = {"classes": 3, "guidance": True}

COUNTS = {  # at 4 x 48^3 in blocks of 4^3: trained (8 blocks beside), and sampled
    "B": (143_005_440, 86_159_104),
    "M": (227_978_496, 171_132_160),
    "L": (508_213_760, 406_728_960),
    "XL": (710_656_512, 609_171_712),
}


def small(grid=GRID, **settings) -> MeanFlowTransformer:
    """A tiny network in float64 whose weights, those that start at zero too, are random."""
    torch.manual_seed(0)
    net = MeanFlowTransformer(2, grid, **{**SMALL, **settings}).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p) / (p.shape[-1] ** 0.5 if p.ndim == 2 else 1))
    return net


@pytest.fixture
def point():
    """z, r, t and a tangent for a batch of B == C == 2."""
    z, tangent = torch.randn(2, 2, 2, *GRID, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return z, torch.tensor([0.1, 0.4]).double(), torch.tensor([0.5, 0.9]).double(), tangent


def condition(labels=(0, 2), omega=(2.0, 5.0), interval=((0.1, 0.8), (0.3, 0.7))) -> Condition:
    return Condition(torch.tensor(labels), torch.tensor(omega).double(), torch.tensor(interval).double())


@pytest.mark.parametrize(("size", "counts"), COUNTS.items())
def test_the_sizes_have_as_many_parameters_as_listed(size, counts):
    with torch.device("meta"):
        net = MeanFlowTransformer(4, (48, 48, 48), **SIZES[size], patch=4)
    assert (parameter_count(net), parameter_count(net.without_v_head())) == counts


@pytest.mark.parametrize(("width", "hidden"), [(768, 2048), (1024, 2752), (192, 512), (16, 48), (24, 64)])
def test_the_hidden_layer_is_eight_thirds_as_wide_rounded_up(width, hidden):
    assert swiglu_width(width) == hidden


def test_tokens_are_blocks_of_cells_in_the_order_of_the_axes():
    z = torch.arange(2 * 2 * 4 * 2 * 6).reshape(2, 2, 4, 2, 6)
    tokens = to_tokens(z, 2)
    assert tokens.shape == (2, 2 * 1 * 3, 2 * 8)
    assert torch.equal(tokens[1, 4].reshape(2, 2, 2, 2), z[1, :, 2:4, 0:2, 2:4])  # block (1, 0, 1)
    assert torch.equal(from_tokens(tokens, 2, (4, 2, 6)), z)


def scores(q, k, blocks, head_width):
    """q . k for every pair of places, (N, N), one vector each everywhere."""
    angles = rotation_angles(blocks, head_width, dtype=torch.float64)
    rotation = angles.cos(), angles.sin()
    n = len(angles)
    return rotate(q.expand(n, -1), rotation) @ rotate(k.expand(n, -1), rotation).T


@pytest.mark.parametrize("head_width", [6, 16, 20])
def test_scores_depend_on_the_offset_of_two_blocks_and_on_nothing_else(head_width):
    blocks = (3, 4, 2)
    torch.manual_seed(0)
    q, k = torch.randn(2, head_width, dtype=torch.float64)
    found: dict[tuple[int, ...], list[float]] = {}
    places = list(itertools.product(*map(range, blocks)))
    for (a, b), score in zip(
        itertools.product(places, places), scores(q, k, blocks, head_width).flatten(), strict=True
    ):
        found.setdefault(tuple(x - y for x, y in zip(a, b, strict=True)), []).append(score.item())
    for same in found.values():
        assert same == pytest.approx([same[0]] * len(same), abs=1e-13)
    different = sorted(values[0] for values in found.values())
    assert len(different) == 5 * 7 * 3  # every offset its own score
    assert min(b - a for a, b in itertools.pairwise(different)) > 1e-9


def test_each_axis_turns_its_own_third_of_a_head_and_the_rest_stays():
    angles = rotation_angles((2, 2, 2), 16, dtype=torch.float64)
    assert angles.shape == (8, 8)
    assert (angles[0] == 0).all()
    for axis, at in enumerate((4, 2, 1)):
        expected = torch.zeros(8, dtype=torch.float64)
        expected[2 * axis : 2 * axis + 2] = torch.tensor([1.0, 0.01])
        torch.testing.assert_close(angles[at], expected)


def test_rotation_keeps_lengths():
    angles = rotation_angles((3, 2, 2), 8, dtype=torch.float64)
    x = torch.randn(12, 8, dtype=torch.float64)
    torch.testing.assert_close(rotate(x, (angles.cos(), angles.sin())).norm(dim=-1), x.norm(dim=-1))


@torch.no_grad()
def test_attention_turns_the_volumes_tokens_and_not_those_of_the_conditions(point):
    net, seen, conditions = small(), [], 4
    net.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    net(*point[:3])
    x, (cos, sin) = seen[0]
    angles = rotation_angles((2, 1, 3), 8, dtype=torch.float64)
    assert x.shape[1] == conditions + len(angles)
    assert torch.equal(cos, torch.cat([torch.ones(conditions, 4), angles.cos()]))
    assert torch.equal(sin, torch.cat([torch.zeros(conditions, 4), angles.sin()]))


@torch.no_grad()
def test_attention_does_not_change_when_everything_moves_together():
    attention = small().blocks[0].attention
    x, angles = torch.randn(1, 12, 16).double(), rotation_angles((3, 2, 2), 8, dtype=torch.float64)
    moved, apart = angles + 0.7, angles * 0.7
    answers = [attention(x, (a.cos(), a.sin())) for a in (angles, moved, apart)]
    torch.testing.assert_close(answers[1], answers[0])
    assert not torch.allclose(answers[2], answers[0], atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("axis", [2, 3, 4])
def test_where_a_block_stands_is_felt_along_each_axis(axis):
    net = small(grid=(4, 4, 4))
    z, r, t = torch.randn(1, 2, 4, 4, 4).double(), torch.zeros(1).double(), torch.ones(1).double()
    swapped = z.roll(2, axis)  # the two blocks along the axis change places
    assert not torch.allclose(net(swapped, r, t), net(z, r, t).roll(2, axis), atol=1e-3)


def test_a_fresh_network_answers_zero():
    net = MeanFlowTransformer(2, GRID, **SMALL, **CONDITIONED)
    z, r, t = torch.randn(1, 2, *GRID), torch.zeros(1), torch.ones(1)
    u, v = net.heads(z, r, t)
    assert u.shape == v.shape == z.shape
    assert (u == 0).all()
    assert (v == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("time_token", [False, True])
def test_times_are_real_numbers_and_t_itself_is_felt_on_request(point, time_token):
    net, (z, *_) = small(time_token=time_token), point
    at = lambda r, t: net(z, torch.full((2,), r).double(), torch.full((2,), t).double())
    assert not torch.equal(at(0.2, 0.5), at(0.2, 0.5 + 1e-6))
    assert not torch.equal(at(0.2, 0.5), at(0.2 + 1e-6, 0.5))
    assert torch.allclose(at(0.25, 0.5), at(0.5, 0.75), rtol=1e-9, atol=1e-9) != time_token


@torch.no_grad()
@pytest.mark.parametrize(
    "changed",
    [
        {"labels": (1, 2)},
        {"omega": (2.1, 5.0)},
        {"interval": ((0.2, 0.8), (0.3, 0.7))},
        {"interval": ((0.1, 0.9), (0.3, 0.7))},
    ],
    ids=["label", "omega", "low", "high"],
)
def test_each_condition_is_felt_by_its_own_sample_in_both_heads(point, changed):
    net, (z, r, t, _) = small(**CONDITIONED), point
    for one, other in zip(net.heads(z, r, t, condition()), net.heads(z, r, t, condition(**changed)), strict=True):
        assert (one[0] - other[0]).abs().max() > 1e-3
        torch.testing.assert_close(one[1], other[1])


@torch.no_grad()
def test_what_is_missing_means_no_class_and_no_guidance(point):
    net, (z, r, t, _) = small(**CONDITIONED), point
    null = condition(labels=(3, 3), omega=(1.0, 1.0), interval=((0.0, 1.0), (0.0, 1.0)))
    expected = net(z, r, t, null)
    for missing in (None, Condition(), Condition(label=null.label), null._replace(label=None)):
        assert torch.equal(net(z, r, t, missing), expected)


@torch.no_grad()
def test_an_unconditional_network_leaves_conditions_alone(point):
    net, (z, r, t, _) = small(), point
    assert torch.equal(net(z, r, t, condition()), net(z, r, t))


@torch.no_grad()
def test_samples_of_a_batch_do_not_see_each_other(point):
    net, (z, r, t, _), given = small(**CONDITIONED), point, condition()
    alone = [net(z[i : i + 1], r[i : i + 1], t[i : i + 1], given.select(torch.tensor([i]))) for i in range(2)]
    torch.testing.assert_close(net(z, r, t, given), torch.cat(alone))


@pytest.mark.parametrize("given", [None, condition()], ids=["plain", "conditioned"])
def test_the_exact_derivative_matches_a_central_difference(point, given):
    net, (z, r, t, tangent) = small(time_token=given is None, **(CONDITIONED if given else {})), point
    u = lambda z_, r_, t_: net(z_, r_, t_, given)
    found = exact(u, z, r, t, tangent)
    with torch.no_grad():
        d = 1e-5
        expected = (u(z + d * tangent, r, t + d) - u(z - d * tangent, r, t - d)) / (2 * d)
        along_t = (u(z, r, t + d) - u(z, r, t - d)) / (2 * d)
    assert along_t.abs().max() > 1e-3  # time is felt
    assert (found - expected).norm() / expected.norm() < 1e-7


def test_gradients_reach_every_weight(point):
    net, (z, r, t, _) = small(time_token=True, **CONDITIONED), point
    u, v = net.heads(z, r, t, condition())
    (u.square().sum() + v.square().sum()).backward()
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        assert (p.grad != 0).any(), name


def test_training_begins_at_the_last_layers(point):
    net, (z, r, t, _) = MeanFlowTransformer(2, GRID, **SMALL).double(), point
    u, v = net.heads(z, r, t)
    ((u - 1).square().sum() + (v - 1).square().sum()).backward()
    moved = {name for name, p in net.named_parameters() if (p.grad != 0).any()}
    assert moved == {"u_last.linear.weight", "u_last.linear.bias", "v_last.linear.weight", "v_last.linear.bias"}


@torch.no_grad()
@pytest.mark.parametrize("v_head_blocks", [1, 3])
def test_the_u_of_forward_is_the_first_of_the_heads_without_computing_the_second(point, v_head_blocks):
    net, (z, r, t, _) = small(v_head_blocks=v_head_blocks), point
    u, v = net.heads(z, r, t)
    assert not torch.allclose(u, v)
    for p in (*net.v_blocks.parameters(), *net.v_last.parameters()):
        p.fill_(torch.nan)
    assert torch.equal(net(z, r, t), u)


@torch.no_grad()
def test_without_its_v_head_the_network_answers_the_same_bit_for_bit(point):
    net, (z, r, t, _) = small(**CONDITIONED), point
    bare = net.without_v_head()
    assert torch.equal(bare(z, r, t, condition()), net(z, r, t, condition()))
    assert parameter_count(bare) < parameter_count(net)
    with pytest.raises(ValueError, match="v_head_blocks=0"):
        bare.heads(z, r, t)
    assert net.heads(z, r, t)[1].shape == z.shape  # the original keeps its own


def test_a_network_built_without_v_head_loads_what_is_left_once_it_is_dropped(point):
    net, bare = small(), small(v_head_blocks=0)
    kept = {k: v for k, v in net.state_dict().items() if k.split(".")[0] not in net.V_HEAD_MODULES}
    assert kept.keys() == net.without_v_head().state_dict().keys()
    bare.load_state_dict(kept)
    assert torch.equal(bare(*point[:3]), net(*point[:3]))


def test_muon_is_left_the_matrices_of_the_blocks():
    net = small(**CONDITIONED)
    prefixes = tuple(f"{name}." for name in net.ADAMW_MODULES)
    for name in net.ADAMW_MODULES:
        assert net.get_submodule(name) is not None
    matrices = {name for name, p in net.named_parameters() if p.ndim >= 2 and not name.startswith(prefixes)}
    kinds = ("attention.to_qkv", "attention.to_out", "mlp.inner", "mlp.outer")
    blocks = ("blocks.0", "blocks.1", "blocks.2", "v_blocks.0")
    assert matrices == {f"{block}.{kind}.weight" for block in blocks for kind in kinds}


def test_under_autocast_the_answer_is_finite_and_close(point):
    net, (z, r, t, _) = small().float(), [value.float() for value in point]
    with torch.autocast("cpu", torch.bfloat16):
        found = net(z, r, t)
    expected = net(z, r, t)
    assert (found - expected).norm() / expected.norm() < 0.05


def test_a_grid_that_does_not_divide_is_refused_with_the_nearest_ones():
    with pytest.raises(UserError) as caught:
        MeanFlowTransformer(2, (12, 18, 3), **{**SMALL, "patch": 4})
    text = str(caught.value)
    assert "(12, 18, 3)" in text
    assert "multiple of 4" in text
    for nearest in ("(12, 16, 4)", "(12, 20, 4)", "(48, 64, 16)", "(48, 80, 16)", "network.patch=3"):
        assert nearest in text


def test_grids_that_divide_pass():
    check_token_grid((4, 8, 12), patch=4)
    check_token_grid((5, 7, 9), patch=1)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"width": 16, "heads": 3}, "width 16 is not divisible by 3 heads"),
        ({"width": 16, "heads": 4}, "heads of 4 channels"),
        ({"width": 14, "heads": 2}, "heads of 7 channels"),
        ({"v_head_blocks": 4}, "v_head_blocks 4 is not between 0 and the depth 3"),
        ({"v_head_blocks": -1}, "between 0 and the depth"),
    ],
)
def test_counts_that_do_not_fit_each_other_are_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        MeanFlowTransformer(2, GRID, **{**SMALL, **settings})


def test_a_latent_of_another_size_is_refused(point):
    with pytest.raises(AssertionError, match="latents of"):
        small(grid=(4, 4, 4))(*point[:3])
