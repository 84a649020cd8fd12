"""`neuromf diagnose` on run folders: of this project, of before it, and damaged ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from neuromf.errors import UserError
from neuromf.files import write_json, write_text
from neuromf.pipeline import diagnose as module
from neuromf.pipeline.diagnose import PICTURE, diagnose, gather

Run = Callable[..., Any]
NEW = "diagnostics/aggregate_results/training_summary.json"
OLD = "diagnostics/training_summary.json"


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No picture is drawn, for tests that look at something else."""
    monkeypatch.setattr(module, "diagnosis_figure", lambda path, *args, **kwargs: path)


def epoch(number: int, raw: float = 1.0) -> dict[str, Any]:
    return {
        "epoch": number,
        "global_step": 10_000 * number,
        "loss_mean": 1.0,
        "raw_loss_mean": raw,
        "raw_loss_fm_mean": raw,
        "raw_loss_mf_mean": None,
        "velocity_norms": {"u_norm": 1.0, "compound_v_norm": 1.2, "target_v_norm": 1.4, "jvp_norm": 2.0},
        "cosine_sim_V_vc": 0.5 + 0.02 * number,
        "per_channel_loss": [raw, 1.1 * raw],
    }


WELL = [epoch(n) for n in range(1, 12)]
ILL = [epoch(n, raw=10.0 ** (n - 5)) for n in range(1, 12)]


def run_of(folder: Path, summaries: Any, name: str = NEW) -> Path:
    write_json(folder / name, summaries)
    return folder


def test_a_run_that_is_well_ends_with_0_and_a_picture(neuromf: Run) -> None:
    run_of(Path("run"), WELL)
    shown = neuromf("diagnose", "run")
    assert shown.exit_code == 0, shown.stdout + shown.stderr
    assert "phase: late (110,000 updates, no plan known" in shown.stdout
    assert "found: 0 problems, 0 warnings, 0 notes" in shown.stdout
    assert (Path("run") / PICTURE).read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("undrawn")
def test_a_problem_ends_with_4_and_its_numbers(neuromf: Run) -> None:
    run_of(Path("run"), ILL)
    shown = neuromf("diagnose", "run")
    assert shown.exit_code == 4
    assert "the adaptive weight masks a divergence" in shown.stderr
    assert "raw_loss_mean 100,000 (epoch 9-11)" in " ".join(shown.stdout.split())
    assert "training.lr=2e-05" in shown.stdout


def test_json_is_one_object_and_holds_what_is_printed(neuromf: Run) -> None:
    run_of(Path("run"), ILL)
    result = neuromf("diagnose", "run", "--json", "--out", "elsewhere/seen.png")
    assert result.exit_code == 4
    report = json.loads(result.stdout)
    assert report["phase"]["name"] == "late"
    assert report["picture"] == "elsewhere/seen.png"
    assert Path(report["picture"]).is_file()
    assert not (Path("run") / PICTURE).exists()
    masked = next(finding for finding in report["findings"] if finding["id"] == "masked_divergence")
    assert set(masked) == {"id", "severity", "title", "numbers", "why", "setting", "evidence"}
    assert {"name": "loss_mean", "value": 1.0, "epochs": [9, 11]} in masked["numbers"]


@pytest.mark.parametrize("name", [NEW, OLD])
def test_both_places_of_the_array_are_read(tmp_path: Path, name: str) -> None:
    evidence, remarks = gather(run_of(tmp_path, WELL, name))
    assert [summary["epoch"] for summary in evidence.summaries] == list(range(1, 12))
    assert remarks == []


@pytest.mark.parametrize("folder", ["diagnostics/per_epoch_metrics", "diagnostics"])
def test_epochs_in_folders_of_their_own_are_read(tmp_path: Path, folder: str) -> None:
    for summary in WELL:
        write_json(tmp_path / folder / f"epoch_{summary['epoch']:03d}" / "summary.json", summary)
    evidence, _ = gather(tmp_path)
    assert evidence.summaries == WELL


def test_figures_in_files_of_their_own_are_put_together(tmp_path: Path) -> None:
    folder = tmp_path / "diagnostics/epoch_024"
    write_json(folder / "losses.json", {"loss_mean": 2.0})
    write_json(folder / "per_channel_loss.json", {"0": 274.0, "1": 160.0})
    (summary,) = gather(tmp_path)[0].summaries
    assert summary == {"epoch": 24, "loss_mean": 2.0, "per_channel_loss": {"0": 274.0, "1": 160.0}}


def test_an_array_that_was_started_anew_is_completed_from_the_folders(tmp_path: Path) -> None:
    run_of(tmp_path, WELL[5:8])
    for number in (1, 2, 6, 11):  # 6 is in the array; 11 is of before a resume and will be redone
        write_json(tmp_path / f"diagnostics/per_epoch_metrics/epoch_{number:03d}/summary.json", epoch(number, raw=9.0))
    evidence, _ = gather(tmp_path)
    assert [(s["epoch"], s["raw_loss_mean"]) for s in evidence.summaries] == [
        (1, 9.0),
        (2, 9.0),
        (6, 1.0),
        (7, 1.0),
        (8, 1.0),
    ]


@pytest.mark.usefixtures("undrawn")
def test_damaged_json_is_named_and_the_rest_is_read(neuromf: Run) -> None:
    run = run_of(Path("run"), WELL, OLD)
    for name in ("diagnostics/epoch_003/summary.json", NEW, "data.json"):
        write_text(run / name, '{"loss_mean": 1.')
    write_text(run / "config.yaml", "training: [")
    shown = neuromf("diagnose", "run")
    assert shown.exit_code == 0
    for name in ("epoch_003/summary.json", NEW, "data.json", "config.yaml"):
        assert any(line.startswith("remark: run/") and name in line for line in shown.stdout.splitlines()), name


def test_damage_that_leaves_nothing_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    write_text(tmp_path / NEW, "[{")
    with pytest.raises(UserError, match="no figures of any epoch") as caught:
        diagnose(tmp_path)
    assert str(tmp_path / NEW) in caught.value.message


def test_an_array_of_another_kind_is_named(tmp_path: Path) -> None:
    run_of(tmp_path, {"epochs": 3})
    with pytest.raises(UserError, match="holds dict, not list"):
        diagnose(tmp_path)


@pytest.mark.parametrize("made", [False, True])
def test_a_folder_without_a_run_is_refused(neuromf: Run, made: bool) -> None:
    if made:
        Path("nothing").mkdir()
    result = neuromf("diagnose", "nothing")
    assert result.exit_code == 2
    assert ("looked for diagnostics/" if made else "there is no run at nothing") in result.stderr


@pytest.mark.usefixtures("undrawn")
def test_settings_and_sizes_come_from_the_run_folder(tmp_path: Path) -> None:
    settings = {
        "objective": {"derivative": "finite-difference"},
        "training": {"updates": 200_000, "batch_size": 16, "accumulation": 4, "precision": "auto"},
    }
    run_of(tmp_path, WELL)
    write_text(tmp_path / "config.yaml", yaml.safe_dump(settings))
    write_json(tmp_path / "data.json", {"latent_shape": [4, 8, 8, 8], "subjects": {"train": 990}})
    write_json(tmp_path / "environment.json", {"processes": 2, "cuda": "H200", "device": "auto"})
    report = diagnose(tmp_path)
    assert report.sizes == {
        "updates": 110_000,
        "planned": 200_000,
        "samples": 990,
        "batch": 128,
        "dimension": 2048,
    }
    assert [finding.id for finding in report.diagnosis.problems] == ["finite_difference_in_bf16"]
    write_json(tmp_path / "environment.json", {"cuda": "H200", "device": "cpu"})
    assert diagnose(tmp_path).problems == []


@pytest.mark.usefixtures("undrawn")
def test_what_an_old_folder_does_not_tell_can_be_given(neuromf: Run) -> None:
    run_of(Path("run"), WELL, OLD)
    write_text(Path("run/config.yaml"), "training: {warmup_steps: 10}\n")
    result = neuromf("diagnose", "run", "training.warmup_steps=90000", "--json")
    assert result.exit_code == 4
    assert [finding["id"] for finding in json.loads(result.stdout)["findings"]] == ["warmup_starvation"]
    assert "no setting 'training.warmup'" in neuromf("diagnose", "run", "training.warmup=3").stderr


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_a_guard_ended_is_told_so_until_it_is_resumed(tmp_path: Path) -> None:
    run_of(tmp_path, WELL)
    write_json(tmp_path / "diagnostics/halted.json", {"global_step": 115_000, "raw_loss_mean": 150.0})
    report = diagnose(tmp_path)
    assert report.problems[0] == "a guard ended the run after update 115,000"
    run_of(tmp_path, [*WELL, epoch(12)])
    assert diagnose(tmp_path).problems == []


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_a_guard_ended_in_its_first_epoch_has_figures(tmp_path: Path) -> None:
    write_json(tmp_path / "diagnostics/halted.json", {"global_step": 60, "raw_loss_mean": 150.0})
    assert diagnose(tmp_path).problems == ["a guard ended the run after update 60"]


def test_a_run_folder_that_cannot_be_written_is_diagnosed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise UserError("could not write it: Read-only file system")

    run_of(tmp_path, WELL)
    monkeypatch.setattr(module, "diagnosis_figure", refused)
    report = diagnose(tmp_path)
    assert report.picture is None
    assert "Read-only file system; --out FILE.png puts it elsewhere" in report.remarks[0]
    with pytest.raises(UserError, match="Read-only"):
        diagnose(tmp_path, out=tmp_path / "a.png")


def test_a_picture_of_another_kind_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a PNG"):
        diagnose(tmp_path / "absent", out=tmp_path / "a.pdf")


def test_a_real_run_is_understood(run: Path, tmp_path: Path) -> None:
    report = diagnose(run, out=tmp_path / "picture.png")
    assert report.sizes["updates"] == report.sizes["planned"] == 12
    assert report.diagnosis.phase.name == "late"
    assert "too_few_updates" in {finding.id for finding in report.diagnosis.findings}
