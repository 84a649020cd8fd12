from __future__ import annotations

import torch
from torch import nn

from neuromf.training.memory import available, estimate

BATCH, CHANNELS, SIDE = 3, 2, 8
LATENT_BYTES = BATCH * CHANNELS * SIDE**3 * 4


class TwoLayers(nn.Module):
    """Backward keeps the input of the convolution and the output of tanh: two latents."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(CHANNELS, CHANNELS, 3, padding=1, bias=False)

    def forward(self, z, r, t):
        return torch.tanh(self.conv(z))


def of(batch: int = BATCH, averages: int = 0, half: bool = False):
    return estimate(TwoLayers(), (CHANNELS, SIDE, SIDE, SIDE), batch, averages, half)


def test_the_activations_are_those_that_backward_keeps():
    assert of().activations == 2 * LATENT_BYTES
    assert of(batch=2 * BATCH).activations == 4 * LATENT_BYTES
    assert of(half=True).activations == LATENT_BYTES


def test_the_state_is_weights_gradients_two_moments_and_the_averages():
    parameters = CHANNELS * CHANNELS * 27
    assert of().parameters == parameters
    assert of().state == 4 * 4 * parameters
    assert of(averages=3).state == 7 * 4 * parameters
    assert of().total >= of().state + of().activations


def test_the_network_itself_is_neither_moved_nor_run():
    network = TwoLayers()
    before = network.conv.weight.clone()
    estimate(network, (CHANNELS, 4000, 4000, 4000), 1, 0, half=False)  # would need a terabyte
    assert network.conv.weight.device.type == "cpu"
    assert torch.equal(network.conv.weight, before)


def test_this_machine_has_memory_and_a_name():
    size, name = available("cpu")
    assert size > 1 << 27
    assert "memory" in name
