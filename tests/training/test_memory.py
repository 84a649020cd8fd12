from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from neuromf.config import TrainConfig
from neuromf.models.networks import build_network
from neuromf.training.memory import Held, Memory, available, estimate, resident
from neuromf.training.objective import Objective

BATCH, CHANNELS, SIDE = 8, 2, 8
SHAPE = (CHANNELS, SIDE, SIDE, SIDE)
LATENT_BYTES = BATCH * CHANNELS * SIDE**3 * 4


class TwoLayers(nn.Module):
    """A convolution and tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(CHANNELS, CHANNELS, 3, padding=1, bias=False)

    def forward(self, z, r, t):
        return torch.tanh(self.conv(z))


def settings(**sections) -> TrainConfig:
    training = {"updates": 9, "batch_size": BATCH, **sections.pop("training", {})}
    objective = {"prediction": "u", **sections.pop("objective", {})}
    return TrainConfig(
        _environment=False,
        **{"ema": {"decays": (0.5,), "select": 0.5}, **sections, "training": training, "objective": objective},
    )


def of(config: TrainConfig, *, half: bool = False, on_cpu: bool = False, network: nn.Module | None = None) -> Memory:
    objective = Objective(network or TwoLayers(), config.objective, channels=CHANNELS)
    return estimate(objective, SHAPE, config, half=half, on_cpu=on_cpu)


def unet(**more) -> dict:
    small = {"channels": (16, 32), "attention_levels": (False, True), "head_channels": 8, "norm_groups": 8}
    return settings(network=small, **more).network.model_dump()


# --- counting ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_what_is_held_is_counted_until_it_is_dropped(device):
    given = torch.zeros(1000, device=device)
    with Held([given]) as held:
        first = given + 1
        view = first.view(10, 100)
        assert given.view(10, 100).shape == view.shape
        assert (held.now, held.peak) == (4000, 4000)
        second = view * 2
        assert held.now == 8000
        del first, view
        assert held.now == 4000
        del second
    assert (held.now, held.peak) == (0, 8000)


def test_the_count_on_meta_is_that_of_the_same_tensors_with_data():
    """The arithmetic of a U-Net with attention, its backward pass and its derivative: nothing is left out on `meta`."""
    peaks = {}
    for device in ("meta", "cpu"):
        with torch.device(device):
            network, z, t = build_network(unet(), SHAPE), torch.zeros(2, *SHAPE), torch.full((2,), 0.5)
        with Held(network.parameters()) as held:
            network(z, t, t).square().mean().backward()
        peaks[device] = held.peak
    assert peaks["meta"] == peaks["cpu"] > 100 * LATENT_BYTES / BATCH


# --- the estimate ------------------------------------------------------------------------------------------------


def test_weights_gradients_moments_and_averages_are_float32():
    parameters = CHANNELS * CHANNELS * 27
    need = of(settings(ema={"decays": (0.5, 0.9, 0.99), "select": 0.9}))
    assert need[:5] == (parameters, 4 * parameters, 4 * parameters, 8 * parameters, 12 * parameters)
    assert need.total >= sum(need[1:])


def test_muon_keeps_one_number_where_adamw_keeps_two():
    network = build_network(unet(), SHAPE)
    adamw = of(settings(), network=network)
    muon = of(settings(training={"optimizer": "muon"}), network=network)
    assert 0.5 * adamw.optimizer < muon.optimizer < 0.6 * adamw.optimizer


def test_what_the_objective_learns_is_a_parameter_that_no_average_follows():
    plain, learned = of(settings()), of(settings(objective={"channel_weights": "learned", "norm_p": 0.5}))
    assert learned.parameters == plain.parameters + CHANNELS
    assert learned.averages == plain.averages


def test_activations_grow_with_the_batch():
    small, large = of(settings()), of(settings(training={"batch_size": 2 * BATCH}))
    assert large.activations == pytest.approx(2 * small.activations, rel=1e-3)
    assert large.weights == small.weights


def test_a_tape_holds_more_than_the_derivative_of_a_quarter_of_the_batch():
    """tanh keeps its result, and its gradient comes beside it; on a GPU the derivative fits into what that leaves."""
    need = of(settings())
    assert need.activations >= (12 + 3) * LATENT_BYTES
    assert need.derivative == 0
    cpu, all_moving = of(settings(), on_cpu=True), of(settings(times={"data_proportion": 0}), on_cpu=True)
    assert 0 < cpu.derivative < cpu.activations
    assert all_moving.derivative == pytest.approx(4 * cpu.derivative, rel=0.01)
    assert of(settings(objective={"name": "rectflow"}), on_cpu=True).derivative == 0


def test_a_second_head_and_a_second_loss_cost_activations():
    plain = of(settings(), network=build_network(unet(), SHAPE))
    headed = build_network({**unet(), "v_head_blocks": 2}, SHAPE)
    v_head = settings(objective={"tangent": "v-head"}, network={"v_head_blocks": 2})
    assert of(v_head, network=headed).activations > 1.1 * plain.activations
    twice = of(settings(objective={"fm_weight": 0.5}), network=build_network(unet(), SHAPE))
    assert twice.activations > 1.8 * plain.activations - 12 * LATENT_BYTES


def test_recomputed_blocks_keep_less():
    network = build_network(unet(), SHAPE)
    kept = of(settings(), network=network).activations
    assert of(settings(training={"recompute": True}), network=network).activations < 0.8 * kept
    assert of(settings(), network=network).activations == kept  # the network itself was not touched


def test_bf16_saves_less_than_half_for_norms_stay_whole():
    transformer = {"name": "mit", "size": None, "depth": 2, "width": 64, "heads": 2, "patch": 2, "v_head_blocks": 0}
    network = build_network(settings(network=transformer).network.model_dump(), SHAPE)
    whole, half = (of(settings(), network=network, half=half).activations for half in (False, True))
    assert 0.5 * whole < half < 0.98 * whole


def test_the_network_itself_is_neither_moved_nor_run():
    network = TwoLayers()
    before = network.conv.weight.clone()
    objective = Objective(network, settings().objective)
    estimate(objective, (CHANNELS, 4000, 4000, 4000), settings(), half=False, on_cpu=True)  # would need terabytes
    assert network.conv.weight.device.type == "cpu"
    assert torch.equal(network.conv.weight, before)


def test_this_machine_has_memory_and_a_name():
    size, name = available("cpu")
    assert size > 1 << 27
    assert "memory" in name
    assert 1 << 24 < resident() < size


# --- against what a process really takes -----------------------------------------------------------------------------

MEASURE = """
import json, sys, torch
from neuromf import config
from neuromf.pipeline.time_step import time_step
from pathlib import Path
found = time_step(config.load("imf-xpred", sys.argv[2:]), Path(sys.argv[1]), device="cpu")
print(json.dumps({"estimate": found.plan.memory.total, "measured": found.times.memory_bytes}))
"""
NETWORKS = {
    "unet": ["network.channels=[32,64,128]", "network.attention_levels=[false,false,true]", "network.norm_groups=16",
             "network.res_blocks=1", "training.batch_size=16"],
    "mit": ["network.name=mit", "network.size=null", "network.depth=6", "network.width=192", "network.heads=4",
            "network.patch=1", "training.batch_size=8"],
    "mlp": ["network.name=mlp", "network.width=2048", "network.depth=4", "training.batch_size=64"],
}  # fmt: skip
HEAD = ["objective.tangent=v-head", "network.v_head_blocks=2"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the process as Linux counts it")
@pytest.mark.parametrize("head", [["network.v_head_blocks=0"], HEAD], ids=["one head", "two"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_estimate_is_within_30_percent_of_the_resident_memory(tmp_path, name, head, record_property):
    from neuromf.data.preprocessing import Preprocessing
    from neuromf.models.autoencoder import load_autoencoder
    from neuromf.pipeline.encode import encode
    from neuromf.pipeline.render import Recipe, render

    render([], tmp_path / "heads", n=8, recipe=Recipe(size=(24, 24, 24), spacing_mm=8.0))
    spec = Preprocessing(size=(24, 24, 24), spacing_mm=8.0, centre="grid")
    encode([tmp_path / "heads"], tmp_path / "latents", autoencoder=load_autoencoder("haar"), preprocessing=spec)
    words = ["training.updates=50", "training.epochs=null", "training.accumulation=1", *NETWORKS[name], *head]
    answer = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "latents"), *words], capture_output=True, text=True, check=True
    )
    found = json.loads(answer.stdout)
    record_property("estimate / measured", found["estimate"] / found["measured"])
    assert found["estimate"] == pytest.approx(found["measured"], rel=0.3)
