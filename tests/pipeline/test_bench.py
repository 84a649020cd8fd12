"""The benchmark times what it says it times; how long it takes is nobody's test."""

from __future__ import annotations

import pytest
import torch

from neuromf import config
from neuromf.errors import UserError
from neuromf.models.autoencoder import load_autoencoder
from neuromf.pipeline import bench as module
from neuromf.pipeline.bench import bench

SMALL = [
    "network.channels=[16]",
    "network.attention_levels=[false]",
    "network.head_channels=16",
    "network.norm_groups=8",
]


def ways(report: module.BenchReport) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for cost in report.costs:
        found.setdefault(cost.of, []).append(cost.way)
    return found


def test_everything_is_timed_beside_its_reference() -> None:
    seen: list[tuple[str, int, int]] = []
    report = bench(
        config.load("cpu-small", SMALL),
        shape=(8, 4, 4, 4),
        batch=4,
        device="cpu",
        autoencoder=load_autoencoder("identity"),
        seconds=0,
        progress=lambda *step: seen.append(step),
    )
    assert ways(report) == {
        "update": ["flow matching, r = t", "as configured"],
        "derivative": ["one evaluation of u", "exact", "torch.func.jvp", "finite difference"],
        "samples": ["1 evaluation", "10 evaluations"],
        "decode": ["identity"],
    }
    assert all(cost.low_ms <= cost.ms <= cost.high_ms and cost.calls == module.FEWEST for cost in report.costs)
    assert [cost.relative for cost in report.costs if cost.way == "flow matching, r = t"] == [1.0]
    assert "2 with r < t" in report.facts["latents"]
    assert seen[-1] == ("timing decode", module.MOST, module.MOST)
    assert any("torch.func.jvp" in line for line in report.lines())


def test_the_ways_of_taking_the_derivative_agree() -> None:
    work = module._Work(config.load("demo", SMALL), (8, 4, 4, 4), 4, "cpu")
    for weight in work.bare.network.parameters():
        weight.data.add_(0.02 * torch.randn_like(weight))
    found = {name: way() for name, way in work.derivatives().items()}
    torch.testing.assert_close(found["exact"], found["torch.func.jvp"], rtol=1e-4, atol=1e-4)
    assert found["finite difference"].shape == found["exact"].shape


def test_flow_matching_takes_no_derivative() -> None:
    report = bench(config.load("demo-rectflow", SMALL), shape=(8, 4, 4, 4), batch=2, device="cpu", seconds=0)
    assert ways(report) == {"update": ["flow matching, r = t"], "samples": ["1 evaluation", "10 evaluations"]}


def test_a_grid_the_network_cannot_take_is_refused() -> None:
    with pytest.raises(UserError):
        bench(config.load("imf-xpred"), shape=(4, 9, 9, 9), device="cpu")
