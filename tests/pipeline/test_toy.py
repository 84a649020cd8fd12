from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from neuromf.errors import UserError
from neuromf.files import read_json
from neuromf.generator import load
from neuromf.pipeline import toy as pipeline
from neuromf.pipeline import toy_problems
from neuromf.pipeline.recorder import Silent
from neuromf.pipeline.sample import sample
from neuromf.pipeline.toy import ToyReport, toy
from neuromf.pipeline.toy_task import Task

TINY = ["network.width=16", "network.depth=2", "training.batch_size=32", "training.updates=24"]
TINY_VOLUMES = [
    "network.channels=[8, 8]", "network.attention_levels=[false, false]", "network.head_channels=8",
    "network.norm_groups=4", "network.res_blocks=1", "training.batch_size=4", "training.updates=10",
]  # fmt: skip


@pytest.fixture(scope="module")
def few() -> pytest.MonkeyPatch:
    patch = pytest.MonkeyPatch()
    patch.setattr(pipeline, "SAMPLES", 100)
    patch.setattr(toy_problems, "POINTS", 320)
    patch.setattr(toy_problems, "VOLUMES", 40)
    patch.setattr(toy_problems, "HELD_BACK", 400)
    patch.setattr(toy_problems, "READER_VOLUMES", 300)
    yield patch
    patch.undo()


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("toy") / "points"


@pytest.fixture(scope="module")
def report(few: pytest.MonkeyPatch, out: Path) -> ToyReport:
    return toy("toy-torus", out, seeds=[3, 4], overrides=TINY)


def test_the_table_has_a_line_per_run_and_number_of_evaluations(report: ToyReport) -> None:
    found = [(row["prediction"], row["seed"], row["evaluations"]) for row in report.rows]
    assert found == [(p, s, n) for p, s in (("x", 3), ("x", 4), ("u", 3)) for n in (1, 2, 5)]
    assert all(math.isfinite(row["distance"]) and math.isfinite(row["abs(norm - 1)"]) for row in report.rows)


def test_table_figure_and_report_lie_in_the_folder(report: ToyReport, out: Path) -> None:
    assert json.loads((out / "toy.json").read_text())["rows"] == report.rows
    assert (out / "table.md").read_text().count("\n| x ") == 6
    assert (out / "figure2.png").stat().st_size > 10_000


def test_every_gate_is_judged_and_an_untrained_network_fails_the_right_ones(report: ToyReport) -> None:
    gates = {gate.id: gate for gate in report.gates}
    assert list(gates) == [f"P2-T{n}" for n in range(1, 9)]
    assert [gate.id for gate in report.gates if not gate.required] == ["P2-T7", "P2-T8"]
    assert gates["P2-T1"].passed
    assert gates["P2-T2"].passed
    assert gates["P2-T3"].passed
    assert not gates["P2-T5"].passed
    assert [line[:5] for line in report.failed] == [g.id for g in report.gates if g.required and not g.passed]
    assert not any("P2-T8" in line for line in report.failed)


def test_a_run_folder_is_one_like_any_other(report: ToyReport, out: Path, tmp_path: Path) -> None:
    generator = load(out / "x-seed3")
    samples = generator.sample_latents(range(100), seed=3)
    distance = float((samples.reshape(-1, 2, 2).norm(dim=2) - math.sqrt(0.5)).norm(dim=1).mean())
    row = next(row for row in report.rows if (row["prediction"], row["seed"], row["evaluations"]) == ("x", 3, 1))
    assert distance == pytest.approx(row["distance"], rel=1e-5)
    assert sample(str(out / "x-seed3"), 5, out=tmp_path / "samples", device="cpu").made == 5


def test_the_same_call_judges_again_without_training(report: ToyReport, out: Path) -> None:
    weights = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    again = toy("toy-torus", out, seeds=[3, 4], overrides=TINY)
    assert again.rows == report.rows
    assert weights == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}


def test_seeds_have_their_own_data(report: ToyReport, out: Path) -> None:
    first, second = (read_json(out / f"x-seed{seed}" / "data.json") for seed in (3, 4))
    assert first["digest"] != second["digest"]
    assert first["statistics"]["mean"] != second["statistics"]["mean"]


def test_a_folder_of_other_settings_is_refused(report: ToyReport, out: Path) -> None:
    with pytest.raises(UserError, match=r"training\.lr"):
        toy("toy-torus", out, seeds=[3], overrides=[*TINY, "training.lr=0.5"])


def test_volumes_go_the_same_way(few: pytest.MonkeyPatch, tmp_path: Path) -> None:
    report = toy("toy-volume", tmp_path / "volumes", seeds=[0], overrides=TINY_VOLUMES, both=False)
    assert report.problem == "blobs of two angles, 4 x 8^3"
    assert report.facts["of real volumes: angle error (rad)"] < 0.02
    assert report.facts["distance"] < 0.02
    assert report.facts["residual"] < 0.03
    assert len(report.rows) == 3
    assert report.rows[0]["residual"] > 0.2


def test_a_losing_validation_curve_is_told_from_a_winning_one(report: ToyReport, out: Path) -> None:
    config = pipeline.settings.load("toy-torus", [*TINY, "training.seed=3"])
    trial = pipeline._trial(Task(config, out / "x-seed3", 8, "cpu"), Silent())
    for losses, passed in (((3.0, 2.0, 1.0), True), ((3.0, 1.0, 2.0), False), ((1.0, 1.0, 0.5), False)):
        epochs = [{"epoch": e, "val_raw_loss": loss} for e, loss in zip((1, 10, 100), losses, strict=True)]
        assert pipeline._falling_gate([trial._replace(epochs=epochs)]).passed is passed


def test_the_ruler_finds_what_is_wrong_with_data(few: pytest.MonkeyPatch) -> None:
    problem = toy_problems.flat_problem(0)
    assert toy_problems.data_faults(problem) == []
    problem.split.train._whitened.mul_(2)
    assert toy_problems.data_faults(problem) == ["training points are whitened"]


def test_the_command_leaves_with_4_when_a_required_gate_fails(few: pytest.MonkeyPatch, neuromf) -> None:
    result = neuromf("toy", "--seeds", 5, "--one", "--jobs", 1, "--json", "-q", *TINY)
    assert result.exit_code == 4
    assert "P2-T5" in result.stderr
    found = json.loads(result.stdout)
    assert found["passed"] is False
    assert found["out"] == "runs/toy-torus"


def test_seeds_that_are_none_are_refused(neuromf) -> None:
    for words in (["-1"], ["0,0"], ["one"]):
        result = neuromf("toy", "--seeds", *words)
        assert result.exit_code == 2
        assert "whole numbers" in result.stderr


def test_problem_sizes_follow_the_constants(few: pytest.MonkeyPatch) -> None:
    assert len(toy_problems.flat_problem(0).split.train) == 320
    assert torch.stack(toy_problems.blob_problem(0, 8).split.train.__getitems__([0])).shape == (1, 4, 8, 8, 8)
