"""Agreement of the weight averages with numbers that the published reference implementations produced."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from neuromf.training.ema import Constant, Decay, HalfLife, WeightAverage

REFERENCE_BATCH = 1024  # hard-coded in the reference's half-lives


class Vector(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value.clone())


def follow(path: Tensor, decay: Decay, every: int = 1) -> Tensor:
    """The average after each of the updates 0, 1, ... that `path` (K + 1, n) records, (K + 1, n)."""
    network = Vector(path[0])
    average = WeightAverage(network, decay, every)
    states = [average.weights["value"].clone()]
    for update, value in enumerate(path[1:], start=1):
        network.value.data = value.clone()
        average.update(network, update, REFERENCE_BATCH)
        states.append(average.weights["value"].clone())
    return torch.stack(states)


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("value", [0.9, 0.99, 0.9999])
def test_the_average_of_a_constant_decay(golden, value):
    d = golden("ema")
    close(follow(d["params"], Constant(value)), d[f"const_{value:g}"], 1e-13)


@pytest.mark.parametrize("kimg", [500, 1000, 2000])
@pytest.mark.parametrize(("suffix", "batch"), [("", REFERENCE_BATCH), ("_batch32", 32), ("_batch256", 256)])
def test_half_life_decays_of_any_batch(golden, kimg, suffix, batch):
    d = golden("ema")
    found = [HalfLife(kimg).beta(int(update), batch) for update in d["steps"]]
    close(torch.tensor(found, dtype=torch.float64), d[f"edm_beta_{kimg}kimg{suffix}"], 1e-13)


@pytest.mark.parametrize("kimg", ["0.5", "1.0"])
def test_the_decays_of_a_half_life_that_leaves_its_ramp(golden, kimg):
    found = [HalfLife(float(kimg)).beta(update, REFERENCE_BATCH) for update in range(1, 41)]
    expected = golden("ema")[f"edm_beta_{kimg}kimg_steps1to40"]
    close(torch.tensor(found, dtype=torch.float64), expected, 1e-13)


@pytest.mark.parametrize("kimg", ["0.5", "1.0", "500", "1000", "2000"])
def test_the_average_of_a_half_life_inside_its_ramp_and_beyond(golden, kimg):
    d = golden("ema")
    close(follow(d["params"], HalfLife(float(kimg))), d[f"edm_{kimg}kimg"], 1e-13)


@pytest.mark.parametrize("value", [0.9, 0.99, 0.9999])
def test_the_average_of_every_sixteenth_update(golden, value):
    """The reference computes in float64 and rounds each result to float32: two units in the last place here."""
    d = golden("ema")
    expected = d[f"pymf_period16_{value:g}"]
    path = d["params"].float()
    assert len(expected.unique(dim=0)) == 3  # the start, update 16, update 32
    found = follow(path, Constant(value), every=16)
    assert found.dtype == expected.dtype
    close(found, expected, 2 * torch.finfo(torch.float32).eps)
    close(follow(path.double(), Constant(value), every=16).float(), expected, torch.finfo(torch.float32).eps)
