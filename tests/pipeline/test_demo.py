from __future__ import annotations

import json
from pathlib import Path

import pytest

from neuromf import config
from neuromf.pipeline import demo as pipeline
from neuromf.pipeline.render import Recipe


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, small: list[str]) -> None:
    """The demo's chain with a dozen coarse heads and a dozen updates."""
    load = config.load
    monkeypatch.setattr(pipeline, "HEADS", 14)
    monkeypatch.setattr(pipeline, "GENERATED", 4)
    monkeypatch.setattr(pipeline, "SHOWN", 2)
    monkeypatch.setattr(pipeline, "FRACTIONS", (0.6, 0.1, 0.3))
    monkeypatch.setattr(pipeline, "RECIPE", Recipe(size=(32, 32, 32), spacing_mm=6.0))
    monkeypatch.setattr(config, "load", lambda preset, overrides: load(preset, [*small, *overrides]))


def test_demo_makes_the_sheet_and_the_table_and_continues(tiny: None, tmp_path: Path) -> None:
    report = pipeline.demo(tmp_path / "demo", jobs=1)
    assert report.sheet.stat().st_size > 10_000
    assert [(row["model"], row["evaluations"]) for row in report.rows] == [
        ("MeanFlow", 1),
        ("MeanFlow", 10),
        ("rectified flow", 1),
        ("rectified flow", 10),
    ]
    assert json.loads((tmp_path / "demo/demo.json").read_text())["rows"] == report.rows
    assert "Frechet" in (tmp_path / "demo/table.md").read_text()
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "demo/runs").rglob("*.safetensors")}
    (tmp_path / "demo/sheet.png").unlink()
    again = pipeline.demo(tmp_path / "demo", jobs=1)
    assert again.sheet.exists()
    assert [row["Frechet (builtin)"] for row in again.rows] == [row["Frechet (builtin)"] for row in report.rows]
    assert kept == {p: p.stat().st_mtime_ns for p in (tmp_path / "demo/runs").rglob("*.safetensors")}


@pytest.mark.slow  # new processes import everything again, twice
def test_models_trained_side_by_side_are_those_trained_in_turn(tiny: None, tmp_path: Path) -> None:
    here, beside = (pipeline.demo(tmp_path / f"jobs{jobs}", jobs=jobs) for jobs in (1, 2))
    assert beside.rows == here.rows


def test_both_models_of_the_demo_have_the_same_budget() -> None:
    meanflow, rectflow = (config.load(preset) for preset in pipeline.MODELS.values())
    assert meanflow.objective.name == "imf"
    assert rectflow.objective.name == "rectflow"
    assert meanflow.network == rectflow.network
    assert meanflow.training == rectflow.training
    assert meanflow.ema == rectflow.ema
