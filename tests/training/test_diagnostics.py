from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from neuromf.config import ObjectiveConfig, TimesConfig
from neuromf.models.networks import build_network
from neuromf.training.diagnostics import (
    EXPECTED_PAIRS,
    StepProbe,
    block_grad_norms,
    block_of,
    describe_samples,
    expected_sampling,
    mean_by_time,
    relative_distance,
    sampling_figures,
)

TINY_UNET = {
    "name": "maisi-unet", "channels": (8, 16), "attention_levels": (False, True), "head_channels": 8, "res_blocks": 1,
    "norm_groups": 8,
}  # fmt: skip
TIMES, OBJECTIVE = TimesConfig(), ObjectiveConfig(t_min=0.01)


class Blocks(nn.Module):
    """Two named parts and a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.down_blocks = nn.ModuleList(nn.Linear(2, 1, bias=False) for _ in range(2))
        self.places = nn.Parameter(torch.zeros(3))


# --- bins ----------------------------------------------------------------------------------------------------------


def test_a_loss_is_averaged_in_the_bin_of_its_time():
    t = torch.tensor([0.0, 0.1, 0.2, 0.79, 0.8, 1.0])
    loss = torch.tensor([1.0, 3.0, 5.0, 7.0, 8.0, 10.0])
    assert mean_by_time(loss, t) == [2.0, 5.0, None, 7.0, 9.0]
    assert mean_by_time(loss[:0], t[:0], bins=2) == [None, None]


# --- weights and gradients -----------------------------------------------------------------------------------------


def test_the_blocks_of_a_unet_are_called_as_the_schema_says_whatever_is_around_it():
    common = {
        "time_embed",
        "conv_in",
        "down_block_0",
        "down_block_1",
        "middle_block",
        "up_block_0",
        "up_block_1",
        "out",
    }
    plain = build_network({**TINY_UNET, "conditioning": "r+t"}, (2, 4, 4, 4))
    assert set(block_grad_norms(plain)) == common | {"r_embed"}
    wrapped = {"conditioning": "t+h", "patch": 2, "pad": True, "precondition": True, "v_head_blocks": 1}
    network = build_network({**TINY_UNET, **wrapped}, (2, 8, 8, 8))
    assert set(block_grad_norms(network)) == common | {"h_embed", "v_head"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"name": "mlp", "width": 4, "depth": 3}, {"first", "hidden_0", "hidden_1", "out"}),
        (
            {"name": "mit", "size": None, "depth": 3, "width": 96, "heads": 4, "patch": 1, "v_head_blocks": 1},
            {"patch_embed", "conditioning", "block_0", "block_1", "u_last", "v_block_0", "v_last"},
        ),
    ],
)
def test_other_networks_have_blocks_of_their_own(settings, expected):
    network = build_network(settings, (2, 2, 2, 2))
    assert {block_of(network, name) for name, _ in network.named_parameters()} >= expected


def test_block_norms_are_root_mean_squares_of_a_blocks_gradients():
    network = Blocks()
    network.first.weight.grad = torch.full((2, 2), 3.0)
    network.first.bias.grad = torch.tensor([0.0, 6.0])
    network.down_blocks[0].weight.grad = torch.tensor([[3.0, -4.0]])
    network.down_blocks[1].weight.grad = torch.tensor([[math.inf, 0.0]])
    found = block_grad_norms(network)
    assert found["first"] == pytest.approx(math.sqrt((4 * 9 + 36) / 6))
    assert found["down_block_0"] == pytest.approx(math.sqrt(12.5))
    assert found["down_block_1"] is None
    assert found["places"] is None  # it took no part


def test_the_blocks_make_up_the_whole_gradient():
    network = build_network(TINY_UNET, (2, 4, 4, 4))
    for i, p in enumerate(network.parameters()):
        p.grad = torch.full_like(p, 0.01 * i)
    sizes: dict[str, int] = {}
    for name, p in network.named_parameters():
        sizes[block_of(network, name)] = sizes.get(block_of(network, name), 0) + p.numel()
    squares = sum(norm**2 * sizes[name] for name, norm in block_grad_norms(network).items())
    whole = nn.utils.clip_grad_norm_(network.parameters(), math.inf)
    assert math.sqrt(squares) == pytest.approx(float(whole), rel=1e-5)


def test_distances_are_relative_to_the_length_of_all_tensors_together():
    reference = [torch.tensor([3.0]), torch.tensor([[0.0], [4.0]])]
    moved = [torch.tensor([3.0]), torch.tensor([[0.5], [4.0]])]
    assert relative_distance(moved, reference) == pytest.approx(0.1)
    assert relative_distance(reference, reference) == 0.0
    assert relative_distance(moved, [torch.zeros(1), torch.zeros(2, 1)]) is None
    assert relative_distance([torch.tensor([math.nan])], [torch.ones(1)]) is None


def test_a_probe_sees_a_known_step_and_the_gradient_before_clipping():
    network = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[3.0, 4.0]]))
    network.weight.grad = torch.tensor([[1.0, 1.0]])
    probe = StepProbe(network)
    nn.utils.clip_grad_norm_(network.parameters(), 0.1)
    torch.optim.SGD(network.parameters(), lr=5.0).step()  # a step of length lr x clip
    figures = probe.figures()
    assert figures["block_grad_norms"] == {"weight": pytest.approx(1.0)}
    assert figures["relative_update_norm"] == pytest.approx(0.1, rel=1e-4)


def test_an_update_that_was_skipped_moved_nothing():
    assert StepProbe(Blocks()).figures()["relative_update_norm"] == 0.0


# --- draws -----------------------------------------------------------------------------------------------------------


def test_figures_of_pairs_by_hand():
    figures = sampling_figures(torch.tensor([0.0, 0.5, 0.5, 0.2]), torch.tensor([1.0, 0.5, 0.5, 0.4]))
    assert figures == pytest.approx({"t_mean": 0.6, "t_std": math.sqrt(0.055), "h_mean": 0.3, "h_zero_frac": 0.5})


def test_expected_figures_of_uniform_times_are_the_known_ones():
    """The larger of two uniform draws has mean 2/3 and variance 1/18, and exceeds the smaller by 1/3 on average."""
    uniform = TimesConfig(distribution="uniform", data_proportion=0.75)
    expected = expected_sampling(uniform, ObjectiveConfig(prediction="u"), 0.0)
    tolerance = 5 / math.sqrt(EXPECTED_PAIRS)
    assert expected["t_mean"] == pytest.approx(2 / 3, abs=0.24 * tolerance)
    assert expected["t_std"] == pytest.approx(math.sqrt(1 / 18), abs=0.24 * tolerance)
    assert expected["h_mean"] == pytest.approx(0.25 / 3, abs=0.2 * tolerance)
    assert expected["h_zero_frac"] == pytest.approx(0.75, abs=1e-4)


def test_a_flow_model_expects_no_gap():
    flow = expected_sampling(TIMES, ObjectiveConfig(name="rectflow", prediction="u"), 0.0)
    assert (flow["h_mean"], flow["h_zero_frac"]) == (0.0, 1.0)


def test_expected_figures_are_fixed_and_follow_the_training_under_a_curriculum_alone():
    plain = expected_sampling(TIMES, OBJECTIVE, 0.1)
    assert expected_sampling(TIMES, OBJECTIVE, 0.9) == plain
    growing = TimesConfig(gap_start=0.1, gap_curriculum=1.0)
    gaps = [expected_sampling(growing, OBJECTIVE, progress)["h_mean"] for progress in (0.0, 0.5, 1.0)]
    assert gaps == sorted(gaps)
    assert gaps[0] < 0.1 * 0.25
    assert gaps[2] == plain["h_mean"]


def test_a_caller_may_change_what_it_was_given():
    expected_sampling(TIMES, OBJECTIVE, 0.0)["t_mean"] = None
    assert expected_sampling(TIMES, OBJECTIVE, 0.0)["t_mean"] is not None


# --- generated samples -----------------------------------------------------------------------------------------------


def points(*channels: tuple[float, float]) -> torch.Tensor:
    """One sample of two places per channel, (1, C, 2, 1, 1)."""
    return torch.tensor(channels)[None, :, :, None, None]


def test_samples_are_described_by_channel_and_compared_with_one_evaluation():
    one, two, five = points((1.0, 0.0), (0.0, 0.0)), points((0.0, 2.0), (0.0, 0.0)), points((2.0, 0.0), (0.0, 0.0))
    found = describe_samples({1: one, 2: two, 5: five})
    assert set(found["stats"]) == {"nfe_1", "nfe_2", "nfe_5"}
    assert found["stats"]["nfe_2"] == {"mean": [1.0, 0.0], "std": [1.0, 0.0], "min": 0.0, "max": 2.0}
    assert found["nfe_consistency"] == pytest.approx(
        {"mse_1vs2": 5 / 4, "cosine_1vs2": 0.0, "mse_1vs5": 1 / 4, "cosine_1vs5": 1.0}
    )


def test_cosines_are_averaged_over_samples():
    one = torch.cat([points((1.0, 0.0)), points((1.0, 0.0))])
    ten = torch.cat([points((5.0, 0.0)), points((-2.0, 0.0))])
    assert describe_samples({1: one, 10: ten})["nfe_consistency"]["cosine_1vs10"] == pytest.approx(0.0)


def test_samples_that_ran_away_are_null_and_can_be_written():
    found = describe_samples({1: points((1.0, math.inf)), 2: points((1.0, 1.0))})
    assert found["stats"]["nfe_1"]["max"] is None
    json.dumps(found, allow_nan=False)
