"""The launcher of clusters against commands that pretend to be SLURM's: what is submitted, and what never is twice.

`test_ablation_slurm.py` does it with SLURM itself.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from neuromf.errors import UserError
from neuromf.pipeline.ablate import AblateReport, Cluster, ablate, open_ablation, status

Write = Callable[..., Path]
Command = tuple[str, ...]


class Pretended(NamedTuple):
    """What the pretended SLURM was given."""

    folder: Path

    def scripts(self) -> dict[str, str]:
        """By job id, in order."""
        paths = sorted(self.folder.glob("job-*"))
        return {path.name.removeprefix("job-"): path.read_text() for path in paths}

    def option(self, name: str) -> list[str]:
        """The value of an option in each script; "" where it is not given."""
        found = (re.search(rf"^#SBATCH --{name}=(.*)$", text, re.MULTILINE) for text in self.scripts().values())
        return [match.group(1) if match else "" for match in found]

    def rewrite(self, change: Callable[[str], str]) -> None:
        """Change the lines of the queue; an empty one is gone."""
        lines = [change(line) for line in (self.folder / "queue").read_text().splitlines()]
        (self.folder / "queue").write_text("".join(f"{line}\n" for line in lines if line))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: Path) -> Pretended:
    pytest.importorskip("submitit", reason="no submitit: pip install 'neuromf[slurm]'")
    folder = tmp_path / "pretended"
    folder.mkdir()
    monkeypatch.setenv("PRETENDED", str(folder))
    monkeypatch.setenv("PATH", f"{repository / 'tests/slurm/pretended'}{os.pathsep}{os.environ['PATH']}")
    return Pretended(folder)


@pytest.fixture
def submit(plan_file: Write, tmp_path: Path, stand_in: Command) -> Callable[..., AblateReport]:
    plan = str(plan_file())

    def call(cluster: Cluster | None = Cluster(), **options: Any) -> AblateReport:
        return ablate(plan, tmp_path / "out", cluster=cluster, command=stand_in, **options)

    return call


def test_every_stage_is_submitted_once_and_waits_for_what_it_needs(
    slurm: Pretended, submit: Callable[..., AblateReport]
) -> None:
    report = submit(Cluster(at_once=3))
    assert report.submission is not None
    assert len(report.submission.submitted) == 1 + 1 + 8 + 9 + 9
    assert [name.split(".")[1] for name in slurm.option("job-name")] == [
        "render", "encode", "train", "sample", "evaluate", "sample", "evaluate",
    ]  # fmt: skip
    assert slurm.option("array") == ["", "", "0-7%3", "0-7%3", "0-7%3", "", ""]
    waits = ["", "afterok:100", "afterok:101", "aftercorr:102", "aftercorr:103", "afterok:102_0", "afterok:105"]
    assert slurm.option("dependency") == waits
    assert set(slurm.option("time")) == {""}  # the cluster's own
    assert report.states == {"to do": 12}

    again = submit().submission
    assert again is not None
    assert again.lines()[0] == "0 stages submitted, 28 were in the queue already"
    assert len(slurm.scripts()) == 7


def test_only_what_left_the_queue_unfinished_is_submitted_again(
    slurm: Pretended, submit: Callable[..., AblateReport]
) -> None:
    first = submit().submission
    assert first is not None
    ended = {job: stage for stage, job in first.submitted.items()}
    slurm.rewrite(lambda line: line.replace("PENDING", "CANCELLED") if line.startswith("103_2|") else line)
    slurm.rewrite(lambda line: "" if line.startswith("104_2|") else line)  # SLURM has forgotten it
    second = submit().submission
    assert second is not None
    assert set(second.submitted) == {ended["103_2"], ended["104_2"]}
    assert slurm.option("dependency")[-2:] == ["afterok:102_2", "afterok:107"]


def test_a_submission_that_nobody_heard_of_is_found_in_the_queue_and_not_repeated(
    slurm: Pretended, submit: Callable[..., AblateReport]
) -> None:
    (slurm.folder / "no-answer-to-102").touch()  # as if the launcher had been killed after sbatch
    with pytest.raises(UserError, match="Socket timed out") as refusal:
        submit()
    assert "2 of 28 stages were submitted before; the same command submits the rest" in refusal.value.hint
    report = submit().submission
    assert report is not None
    assert len(report.queued) == 2 + 8
    assert len(report.submitted) == 18
    # They wait for jobs whose ids nobody wrote down.
    assert {f"afterok:102_{place}" for place in range(8)} <= set(slurm.option("dependency"))


def test_what_is_asked_of_slurm_stands_in_every_script(
    slurm: Pretended, neuromf: Callable[..., Any], plan_file: Write
) -> None:
    result = neuromf(
        "ablate", plan_file(), "--launcher", "slurm", "--partition", "long", "--time", "1-12:00:00", "--gpus", 2,
        "--cpus", 4, "--memory", 1.5, "--jobs", 2, "--sbatch", "account=lab", "mail-type=END", "--sbatch", "exclusive",
        "--sbatch", "signal=USR1@900", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert len(json.loads(result.stdout)["slurm"]["submitted"]) == 28
    for option, value in {
        "partition": "long", "time": "1-12:00:00", "cpus-per-task": "4", "mem": "1536M", "account": "lab",
        "mail-type": "END", "signal": "USR1@900", "kill-on-invalid-dep": "yes",
    }.items():  # fmt: skip
        assert set(slurm.option(option)) == {value}, option
    assert slurm.option("gpus-per-node") == ["", "2", "2", "2", "1", "2", "1"]
    assert slurm.option("ntasks-per-node") == ["1", "2", "2", "2", "1", "2", "1"]
    assert slurm.option("array")[2] == "0-7%2"
    for script in slurm.scripts().values():
        lines = script.splitlines()
        assert {"#SBATCH --exclusive", "#SBATCH --requeue"} <= set(lines)
        assert lines[-1] == "exit $code"


def test_a_partition_that_does_not_exist_names_those_that_do_and_submits_nothing(
    slurm: Pretended, submit: Callable[..., AblateReport]
) -> None:
    with pytest.raises(UserError, match="invalid partition specified: nowhere") as refusal:
        submit(Cluster(partition="nowhere"))
    assert refusal.value.hint == "--partition takes one of: main, long"
    assert slurm.scripts() == {}
    assert len(submit(Cluster(partition="main")).submission.submitted) == 28  # type: ignore[union-attr]


def test_without_submitit_or_slurm_the_error_says_what_to_do(
    submit: Callable[..., AblateReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    pytest.importorskip("submitit", reason="no submitit: pip install 'neuromf[slurm]'")
    with pytest.raises(UserError, match="not here: sbatch, srun, squeue") as refusal:
        submit()
    assert "login node" in refusal.value.hint
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match="needs submitit") as refusal:
        submit()
    assert "pip install 'neuromf[slurm]'" in refusal.value.hint


def test_a_failed_stage_keeps_back_those_that_need_it_until_it_is_retried(
    slurm: Pretended, submit: Callable[..., AblateReport], tmp_path: Path
) -> None:
    logs = tmp_path / "out/logs"
    first = submit().submission
    assert first is not None
    train = next(stage for stage, job in first.submitted.items() if job == "102_0")
    note = {"stage": train, "reason": "exit code 3", "log": "a.log", "tail": "the loss is not finite"}
    (logs / f"{train}.failed.json").write_text(json.dumps(note))
    slurm.rewrite(lambda line: "" if re.match(r"(10[234]_0|10[56])\|", line) else line)
    report = submit()
    assert report.submission is not None
    assert report.submission.submitted == {}
    assert [failure.stage for failure in report.failures] == [train]
    retried = submit(retry=True).submission
    assert retried is not None
    assert len(retried.submitted) == 5
    assert not (logs / f"{train}.failed.json").exists()


def test_the_local_launcher_leaves_alone_what_jobs_work_at(
    slurm: Pretended,
    submit: Callable[..., AblateReport],
    calls: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    submit()
    with pytest.raises(UserError, match=r"28 stages of .* are in SLURM's queue") as refusal:
        submit(cluster=None)
    assert "scancel 100 101 102 103 104 105 106" in refusal.value.hint
    (slurm.folder / "down").touch()
    with pytest.raises(UserError, match="Unable to contact slurm controller"):
        submit(cluster=None)
    (slurm.folder / "down").unlink()
    assert calls() == []
    slurm.rewrite(lambda line: "")
    assert submit(cluster=None, jobs=4).states == {"finished": 12}
    # All is finished: nobody has to be asked any more.
    (slurm.folder / "down").touch()
    assert submit(cluster=None).states == {"finished": 12}


def test_the_status_shows_the_queue_beside_what_the_files_say(
    slurm: Pretended, submit: Callable[..., AblateReport], plan_file: Write, tmp_path: Path
) -> None:
    ablation = open_ablation(str(plan_file()), tmp_path / "out")
    assert "queue" not in status(ablation)["cells"][0]
    submit()
    slurm.rewrite(lambda line: line.replace("PENDING", "RUNNING") if line.startswith("102_0|") else line)
    slurm.rewrite(lambda line: line.replace("PENDING", "OUT_OF_MEMORY") if line.startswith("102_1|") else line)
    slurm.rewrite(lambda line: "" if line.startswith("102_2|") else line)
    cells = status(ablation)["cells"]
    assert {cell["state"] for cell in cells} == {"to do"}
    seen = {cell["queue"] for cell in cells}
    assert {"running (102_0)", "out_of_memory (102_1)", "not in the queue", "pending (102_3, Resources)"} <= seen
    (slurm.folder / "down").touch()
    assert status(ablation)["cells"][0]["queue"].startswith("unknown: squeue failed")


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--partition", "long", "--gpus", 1], "--partition, --gpus: these are for SLURM"),
        (["--launcher", "slurm", "--sbatch", "array=0-3"], "array cannot be given to sbatch"),
        (["--launcher", "slrum"], "slurm"),
    ],
)
def test_options_of_the_wrong_launcher_exit_2(
    words: list[Any], hint: str, neuromf: Callable[..., Any], plan_file: Write, tmp_path: Path
) -> None:
    result = neuromf("ablate", plan_file(), *words)
    assert result.exit_code == 2
    assert hint in result.stderr
    assert not (tmp_path / "ablations").exists()
