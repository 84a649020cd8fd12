"""The launcher: nothing is done twice, a failure stays alone, and a signal or a kill costs only what was in hand."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from neuromf.errors import UserError
from neuromf.pipeline.ablate import ablate, collect, open_ablation, preview, status
from neuromf.pipeline.ablation.local import alone
from neuromf.pipeline.ablation.plan import read_plan

Write = Callable[..., Path]
Calls = Callable[[], list[str]]
Command = tuple[str, ...]
DIVERGES = "objective.lp=3.0"


def test_every_stage_is_done_once_and_never_again(
    plan_file: Write, tmp_path: Path, stand_in: Command, calls: Calls
) -> None:
    plan, out = str(plan_file()), tmp_path / "out"
    report = ablate(plan, out, jobs=4, command=stand_in)
    assert report.states == {"finished": 12}
    assert report.failures == []
    verbs = [line.split()[0] for line in calls()]
    assert verbs[:2] == ["render", "encode"]
    assert {verb: verbs.count(verb) for verb in set(verbs)} == {
        "render": 1, "encode": 1, "train": 8, "sample": 9, "evaluate": 9,
    }  # fmt: skip
    assert ablate(plan, out, command=stand_in).states == {"finished": 12}
    assert len(calls()) == len(verbs)


def test_a_failing_cell_is_told_with_the_end_of_its_log_and_stops_no_other(
    plan_file: Write, tmp_path: Path, stand_in: Command, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out = str(plan_file()), tmp_path / "out"
    monkeypatch.setenv("STAND_IN_FAILS", DIVERGES)
    said: list[str] = []
    report = ablate(plan, out, jobs=2, message=said.append, command=stand_in)
    assert report.states == {"finished": 10, "failed: train": 2}
    assert [failure.reason for failure in report.failures] == ["exit code 3"] * 2
    assert "error: the loss is not finite" in report.failed[0]
    assert str(out / "logs") in report.failed[0]
    assert sum(line.startswith("warning:") for line in said) == 2
    assert report.results is not None
    assert "Nothing was measured of 3" in report.results.comparisons[1].verdict

    monkeypatch.delenv("STAND_IN_FAILS")
    trained = sum(line.startswith("train") for line in calls())
    assert len(ablate(plan, out, command=stand_in).failures) == 2  # not tried again unasked
    assert sum(line.startswith("train") for line in calls()) == trained
    assert status(open_ablation(plan, out))["counts"] == {"finished": 10, "failed: train": 2}
    assert ablate(plan, out, retry=True, command=stand_in).states == {"finished": 12}
    assert sum(line.startswith("train") for line in calls()) == trained + 2


def _launcher(plan: Path, out: Path, stand_in: Command) -> subprocess.Popen[str]:
    """The whole ablation in a process of its own, as the command line runs it."""
    script = f"""
        from pathlib import Path
        from neuromf.errors import Interrupted
        from neuromf.pipeline.ablate import ablate
        try:
            ablate({str(plan)!r}, Path({str(out)!r}), jobs=2, command={stand_in!r})
        except Interrupted as error:
            raise SystemExit(error.exit_code)
    """
    environment = {**os.environ, "STAND_IN_SECONDS": "60"}
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], text=True, env=environment)


def _until_two_train(calls: Calls) -> None:
    deadline = time.monotonic() + 60
    while sum(line.startswith("train") for line in calls()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends the stages of a killed launcher")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_or_killed_launcher_leaves_no_process_and_the_same_call_continues(
    number: signal.Signals, plan_file: Write, tmp_path: Path, stand_in: Command, calls: Calls
) -> None:
    plan, out = plan_file(), tmp_path / "out"
    launcher = _launcher(plan, out, stand_in)
    _until_two_train(calls)
    launcher.send_signal(number)
    assert launcher.wait(30) == (75 if number == signal.SIGTERM else -signal.SIGKILL)
    with alone(out, lambda _: None, patience_s=10):  # its stages held this lock, too
        pass
    assert [path.read_text().splitlines()[-1] for path in (out / "logs").glob("*.train.log")] == ["saved"] * 2
    assert not list((out / "logs").glob("*.failed.json"))
    assert ablate(str(plan), out, jobs=2, command=stand_in).states == {"finished": 12}
    assert [line.split()[0] for line in calls()].count("render") == 1


def test_two_launchers_in_one_folder_are_kept_apart(tmp_path: Path) -> None:
    with (
        alone(tmp_path, lambda _: None),
        pytest.raises(UserError, match="another `neuromf ablate` is at work"),
        alone(tmp_path, lambda _: None, patience_s=0.2),
    ):
        pass


def test_a_changed_plan_says_what_differs_and_keeps_the_runs_that_are_still_in_it(
    plan_file: Write, tmp_path: Path, stand_in: Command, calls: Calls
) -> None:
    plan, out = plan_file(), tmp_path / "out"
    ablate(str(plan), out, jobs=4, command=stand_in)
    before = len(calls())
    plan.write_text(plan.read_text().replace("[1.5, 2.0, 3.0]", "[1.25, 2.0]"))
    said: list[str] = []
    assert ablate(str(plan), out, jobs=4, message=said.append, command=stand_in).states == {"finished": 10}
    text = "\n".join(said)
    assert "experiments.lp.grid.objective.lp: [1.5, 2.0, 3.0] before, [1.25, 2.0] now" in text
    assert "4 finished runs are still in it and are kept; 4 that it no longer has stay where they are" in text
    assert len(calls()) - before == 2 * 3  # two new runs, three stages each


def test_more_samples_are_drawn_without_training_again(
    plan_file: Write, tmp_path: Path, stand_in: Command, calls: Calls
) -> None:
    plan, out = plan_file("phantoms: {}\npreset: demo\nseeds: [0]\nsample: {n: 4}"), tmp_path / "out"
    ablate(str(plan), out, command=stand_in)
    before = len(calls())
    plan.write_text(plan.read_text().replace("n: 4", "n: 8"))
    ablate(str(plan), out, command=stand_in)
    assert [line.split()[0] for line in calls()[before:]] == ["sample", "evaluate"]


def test_another_plan_or_other_files_in_the_folder_are_refused_and_untouched(
    plan_file: Write, tmp_path: Path, stand_in: Command, calls: Calls
) -> None:
    out = tmp_path / "out"
    ablate(str(plan_file("phantoms: {}\npreset: demo\nseeds: [0]")), out, command=stand_in)
    before = sorted(path for path in out.rglob("*"))
    with pytest.raises(UserError, match="holds the ablation 'small', not 'other'"):
        ablate(str(plan_file(name="other.yaml")), out, command=stand_in)
    assert sorted(path for path in out.rglob("*")) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("dear reader")
    with pytest.raises(UserError, match="is no ablation"):
        ablate(str(plan_file()), tmp_path / "mine", command=stand_in)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_latents_that_are_not_there_name_the_next_command(plan_file: Write, tmp_path: Path) -> None:
    path = plan_file("preset: demo\nseeds: [0]\ndata: no-such\nevaluate: {real: scans}")
    with pytest.raises(UserError, match="neuromf encode SCANS --out no-such"):
        open_ablation(str(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_preview_costs_each_run_once_and_estimates_from_those_that_are_finished(
    plan_file: Write, tmp_path: Path, stand_in: Command, calls: Calls
) -> None:
    text = "phantoms: {heads: 30}\npreset: demo\ngrid: {objective.lp: [1.5, 2.0]}\nsettings: {training.updates: 900}"
    path, out = plan_file(text + "\nnfe: [1, 2]"), tmp_path / "out"
    found = preview(open_ablation(str(path), out), device="cpu")
    assert len(found.rows) == 4
    assert found.total() == {"cells": 4, "runs": 2, "images_to_train": 2 * 900 * 16, "seconds": None}
    assert not out.exists()
    ablation = open_ablation(str(path), out)
    finished = next(stage for stage in ablation.stages if stage.name.endswith(".train"))
    folder = Path(finished.words[finished.words.index("--out") + 1])
    subprocess.run([*stand_in, *finished.words], check=True)
    (out / "plan.yaml").write_text(ablation.plan.to_yaml())
    assert (folder / "result.json").is_file()
    found = preview(open_ablation(str(path), out), device="cpu")
    assert found.total()["seconds"] == pytest.approx(90)  # measured: 900 updates of 16 in 90 s
    assert found.lines()[-1] == "4 cells of 2 runs; 14,400 images to train, about 2 minutes at the pace so far"


def test_collecting_before_anything_is_evaluated_says_so(plan_file: Write, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing is evaluated"):
        collect(open_ablation(str(plan_file()), tmp_path / "out"))
    assert read_plan(str(plan_file())).name == "small"
