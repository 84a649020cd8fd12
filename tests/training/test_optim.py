from __future__ import annotations

import copy
import io

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from neuromf.config import TrainingConfig
from neuromf.errors import UserError
from neuromf.models.unet import MaisiUNet
from neuromf.training.optim import MuonWithAdamW, build_optimizer, learning_rate, parameter_groups

KERNEL, DENSE = "hidden.weight", "dense.weight"
SCALES = ["match_rms_adamw", "original"]


def config(**settings) -> TrainingConfig:
    return TrainingConfig(**{"updates": 100, "lr": 1e-3, "lr_final": 1e-5, "warmup_steps": 10, **settings})


class Backbone(nn.Module):
    """One of everything that a split has to decide about."""

    ADAMW_MODULES = ("first", "out", "token", "absent")

    def __init__(self) -> None:
        super().__init__()
        self.first, self.hidden = nn.Conv3d(2, 4, 3, padding=1), nn.Conv3d(4, 6, 3, padding=1)
        self.first_hidden = nn.Conv3d(6, 6, 1)  # its name begins like a listed module's
        self.norm, self.dense, self.label = nn.GroupNorm(2, 6), nn.Linear(6, 6), nn.Embedding(3, 6)
        self.gate = nn.Parameter(torch.ones(1, 6, 1, 1, 1))
        self.token = nn.Parameter(torch.zeros(2, 6))
        self.out = nn.Sequential(nn.SiLU(), nn.Conv3d(6, 2, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first_hidden(self.norm(self.hidden(torch.tanh(self.first(x)))))
        class_and_token = self.dense(self.label.weight[0] + self.token.sum(0))
        return self.out(y * self.gate + class_and_token.reshape(1, -1, 1, 1, 1))


class Holder(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.log_variance = nn.Parameter(torch.zeros(4))


def backbone() -> Backbone:
    torch.manual_seed(0)
    return Backbone()


def example(seed: int = 1) -> tuple[Tensor, Tensor]:
    x = torch.randn(4, 2, 4, 4, 4, generator=torch.Generator().manual_seed(seed))
    return x, x.roll(1, dims=2) - 0.5 * x.flip(1)


def steps(network: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
    """Train with a rate of its own at each update; the losses."""
    x, y = example()
    losses = []
    for update in range(first, last):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(update, 100, config(lr=1e-2, warmup_steps=2))
        optimizer.zero_grad(set_to_none=True)
        loss = (network(x) - y).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def muon(network: nn.Module, **settings) -> torch.optim.Optimizer:
    return build_optimizer(network, config(optimizer="muon", **settings))


# --- AdamW -------------------------------------------------------------------------------------------------------


def test_only_trainable_parameters_are_optimised_with_the_configured_moments():
    network = nn.Linear(3, 2)
    network.bias.requires_grad_(False)
    optimizer = build_optimizer(network, config(betas=(0.8, 0.9), weight_decay=0.2))
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [id(p) for p in group["params"]] == [id(network.weight)]
    assert (tuple(group["betas"]), group["weight_decay"], group["lr"]) == ((0.8, 0.9), 0.2, 1e-3)


# --- which parameters Muon takes -----------------------------------------------------------------------------------


def test_muon_takes_hidden_matrices_and_nothing_else():
    assert set(parameter_groups(backbone()).matrices) == {KERNEL, "first_hidden.weight", DENSE}


@pytest.mark.parametrize("depth", [1, 2])
def test_a_backbone_is_found_inside_what_holds_it(depth):
    module: nn.Module = backbone()
    for _ in range(depth):
        module = Holder(module)
    prefix = "network." * depth
    groups = parameter_groups(module)
    assert set(groups.matrices) == {prefix + name for name in parameter_groups(backbone()).matrices}
    assert "log_variance" in groups.rest


def test_every_trainable_parameter_is_in_one_group_and_frozen_ones_in_none():
    network = backbone()
    network.hidden.requires_grad_(False)
    network.norm.requires_grad_(False)
    groups = parameter_groups(network)
    trainable = {name for name, p in network.named_parameters() if p.requires_grad}
    assert not groups.matrices.keys() & groups.rest.keys()
    assert groups.matrices.keys() | groups.rest.keys() == trainable
    held = [p for group in muon(network).param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in network.parameters() if p.requires_grad}
    assert len(held) == len(trainable)


def test_a_network_that_does_not_say_its_first_and_last_layers_is_refused():
    with pytest.raises(UserError, match=r"first and last layers of Sequential") as caught:
        muon(nn.Sequential(nn.Linear(3, 3)))
    assert "ADAMW_MODULES" in caught.value.hint
    assert "training.optimizer=adamw" in caught.value.hint


def test_the_hidden_kernels_of_the_unet_are_most_of_it():
    network = MaisiUNet(4, channels=(8, 16), attention_levels=(False, True), head_channels=8, norm_groups=4)
    groups = parameter_groups(network)
    left = [name for name, p in groups.rest.items() if p.ndim >= 2]
    assert any("conv_in" in name for name in left)
    assert any(".out." in name for name in left)
    assert all("block" not in name for name in left), "hidden kernels are for Muon"
    taken = sum(p.numel() for p in groups.matrices.values())
    assert taken > 0.9 * sum(p.numel() for p in network.parameters())


# --- the updates are torch's -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
def test_a_kernel_moves_as_torchs_muon_moves_its_matrix_bit_for_bit(scale):
    network = backbone()
    optimizer = muon(network, muon_scale=scale, muon_momentum=0.9, weight_decay=0.1)
    shapes = {KERNEL: (6, 4 * 27), DENSE: (6, 6)}
    parameters = {name: network.get_parameter(name) for name in shapes}
    twins = {name: p.detach().clone().reshape(shapes[name]) for name, p in parameters.items()}
    theirs = torch.optim.Muon(twins.values(), weight_decay=0.1, momentum=0.9, adjust_lr_fn=scale)
    for update in range(3):
        for group in (*optimizer.param_groups, *theirs.param_groups):
            group["lr"] = 1e-2 / (1 + update)
        optimizer.zero_grad()
        (network(example(update)[0]) - example(update)[1]).square().mean().backward()
        for name, twin in twins.items():
            twin.grad = parameters[name].grad.clone().reshape(shapes[name])
        optimizer.step()
        theirs.step()
        assert all(torch.equal(parameters[name].flatten(1), twins[name]) for name in twins)


def test_everything_else_moves_as_torchs_adamw_moves_it_bit_for_bit():
    network = backbone()
    optimizer = muon(network, betas=(0.8, 0.9), weight_decay=0.1)
    rest = parameter_groups(network).rest
    twins = {name: p.detach().clone() for name, p in rest.items()}
    theirs = torch.optim.AdamW(twins.values(), betas=(0.8, 0.9), weight_decay=0.1, fused=True)
    for update in range(3):
        for group in (*optimizer.param_groups, *theirs.param_groups):
            group["lr"] = 1e-2 / (1 + update)
        optimizer.zero_grad()
        (network(example(update)[0]) - example(update)[1]).square().mean().backward()
        for name, twin in twins.items():
            twin.grad = rest[name].grad.clone()
        optimizer.step()
        theirs.step()
        assert all(torch.equal(rest[name], twins[name]) for name in twins)


def test_the_matched_scale_makes_steps_as_large_as_adamws():
    """AdamW's first step is the rate for every weight; Muon's root mean square is 0.2 of it (Liu 2025)."""
    network = nn.Linear(64, 32)
    network.ADAMW_MODULES = ()
    before = network.weight.detach().clone()
    optimizer = muon(network, lr=1e-2, weight_decay=0)
    network.weight.grad = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    moved = (network.weight.detach() - before).square().mean().sqrt()
    assert moved.item() == pytest.approx(0.2 * 1e-2, rel=0.2)


def test_a_parameter_without_a_gradient_stays_and_gets_no_state():
    network = backbone()
    optimizer = muon(network)
    before = copy.deepcopy(network.state_dict())
    network.dense.weight.grad = torch.ones_like(network.dense.weight)
    optimizer.step()
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {DENSE}
    assert list(optimizer.state) == [network.dense.weight]


def test_the_optimiser_follows_a_parameter_whose_storage_is_exchanged():
    network, moved = backbone(), backbone()
    ours, theirs = muon(network), muon(moved)
    steps(network, ours, 0, 2)
    steps(moved, theirs, 0, 2)
    for p in moved.parameters():
        p.data = p.data.clone()
    steps(network, ours, 2, 4)
    steps(moved, theirs, 2, 4)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), moved.parameters(), strict=True))


@pytest.mark.parametrize("scale", SCALES)
def test_training_with_muon_lowers_the_loss(scale):
    network = backbone()
    losses = steps(network, muon(network, muon_scale=scale, weight_decay=0), 0, 40)
    assert losses[-1] < 0.5 * losses[0]


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned():
    network = backbone()
    optimizer = muon(network)

    def closure() -> float:
        loss = network(example()[0]).square().mean()
        loss.backward()
        return loss.item()

    before = network.hidden.weight.detach().clone()
    assert optimizer.step(closure) > 0
    assert not torch.equal(network.hidden.weight, before)


# --- stopping and going on ---------------------------------------------------------------------------------------


def prepared(network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    AcceleratorState._reset_state()
    return Accelerator(cpu=True).prepare(network, optimizer)


@pytest.mark.parametrize("through_accelerate", [False, True])
def test_a_saved_state_goes_on_bit_for_bit(through_accelerate):
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        network = backbone()
        pair = network, muon(network)
        return prepared(*pair) if through_accelerate else pair

    (whole, optimizer), (first, its) = fresh(), fresh()
    steps(whole, optimizer, 0, 6)
    steps(first, its, 0, 3)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": its.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second, resumed = fresh()
    second.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    steps(second, resumed, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(second.parameters(), whole.parameters(), strict=True))
    ours, theirs = resumed.state_dict(), optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for index, state in theirs["state"].items():
        assert all(torch.equal(ours["state"][index][name], value) for name, value in state.items())


def test_each_group_carries_the_rate_that_the_loop_sets():
    optimizer = muon(backbone(), lr=1e-3)
    assert isinstance(optimizer, MuonWithAdamW)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-3]


# --- learning rates ----------------------------------------------------------------------------------------------


def test_warm_up_rises_on_a_line_from_zero():
    rates = [learning_rate(k, 100, config()) for k in range(11)]
    assert rates == pytest.approx([1e-4 * k for k in range(11)])


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_without_warm_up_the_first_update_has_the_base_rate(schedule):
    assert learning_rate(0, 100, config(schedule=schedule, warmup_steps=0)) == pytest.approx(1e-3)


@pytest.mark.parametrize(("schedule", "last"), [("constant", 1e-3), ("cosine", 1e-5), ("linear", 1e-5)])
def test_the_schedule_ends_with_the_last_update_and_stays_there(schedule, last):
    assert learning_rate(99, 100, config(schedule=schedule)) == pytest.approx(last)
    assert learning_rate(150, 100, config(schedule=schedule)) == pytest.approx(last)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_halfway_down_the_rate_is_the_mean_of_both_ends(schedule):
    rate = learning_rate(60, 111, config(schedule=schedule, updates=111))
    assert rate == pytest.approx((1e-3 + 1e-5) / 2)


def test_a_warm_up_longer_than_the_run_still_only_rises():
    rates = [learning_rate(k, 5, config(updates=5)) for k in range(5)]
    assert rates == sorted(rates)
    assert rates[-1] < 1e-3


# --- the references' learning rates (see the golden README) ---------------------------------------------------------


def rates(golden, updates: int, *, start: float = 0.0, **settings) -> Tensor:
    """The rates at the golden's `steps` of a schedule that spans `updates`."""
    training = config(**settings)
    found = [learning_rate(int(k), updates, training, start=start) for k in golden("lr")["steps"]]
    return torch.tensor(found, dtype=torch.float64)


def agree(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-17)


@pytest.mark.parametrize("warmup_epochs", [0, 10])
def test_constant_rates_are_the_references(golden, warmup_epochs):
    found = rates(golden, 211, lr=1e-4, schedule="constant", warmup_steps=7 * warmup_epochs)
    agree(found, golden("lr")[f"warmup_const_{warmup_epochs}x7"])


def test_the_cosine_is_the_references_which_ends_one_warm_up_before_the_run(golden):
    warmup, run = 70, 210
    found = rates(golden, run - warmup + 1, lr=1e-4, lr_final=1e-5, schedule="cosine", warmup_steps=warmup)
    agree(found, golden("lr")["warmup_cosine_10x7_of30_min0.1"])


def test_a_warm_up_that_does_not_begin_at_zero_is_the_references(golden):
    found = rates(golden, 211, start=1e-8, lr=6e-4, schedule="constant", warmup_steps=70)
    agree(found, golden("lr")["pymf_warmup70_lr0.0006"])
