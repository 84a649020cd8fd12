"""A real plan, by the real commands, of the smallest size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from neuromf.pipeline.ablate import ablate

PLAN = """
preset: demo
settings:
  network: {channels: [8, 16], attention_levels: [false, true], norm_groups: 4, head_channels: 8, patch: 1}
  training: {updates: 4, batch_size: 2}
  objective.lp: 1.5
data: DATA
grid: {objective.prediction: [x, u]}
sample: {n: 3}
evaluate: {real: HEADS, autoencoder: haar}
metric: kid_builtin
also: [spectrum_distance]
"""


@pytest.mark.slow
def test_two_cells_are_trained_sampled_evaluated_and_compared(latents: Path, heads: Path, in_tmp: Path) -> None:
    (in_tmp / "two.yaml").write_text(PLAN.replace("DATA", str(latents)).replace("HEADS", str(heads)))
    report = ablate("two.yaml", jobs=2, device="cpu")
    assert report.failures == []
    assert report.states == {"finished": 2}
    results = json.loads((in_tmp / "ablations/two/results/results.json").read_text())
    x, u = results["cells"]
    assert (x["objective.prediction"], u["objective.prediction"]) == ("x", "u")
    assert x["kid_builtin"] != u["kid_builtin"]
    assert x["spectrum_distance"] > 0
    assert results["comparisons"][0]["verdict"].startswith("No test: one run says nothing about chance: x, u.")
    runs = sorted((in_tmp / "ablations/two/runs").iterdir())
    assert ["config.yaml" in {path.name for path in run.iterdir()} for run in runs] == [True, True]


@pytest.mark.slow
def test_invented_heads_are_made_on_the_way(in_tmp: Path) -> None:
    text = PLAN.replace("data: DATA", "phantoms: {heads: 12, size: 16, spacing_mm: 12.0, autoencoder: haar}")
    (in_tmp / "own.yaml").write_text(text.replace("real: HEADS, ", "") + "seeds: [0, 1]\n")
    report = ablate("own.yaml", jobs=2, device="cpu")
    assert report.states == {"finished": 4}, report.failed
    assert report.results is not None
    assert report.results.comparisons[0].test == "Welch's t"
