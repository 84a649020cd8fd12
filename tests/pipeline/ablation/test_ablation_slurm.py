"""The launcher of clusters with SLURM itself, as a cluster of one node on this machine (tests/slurm/cluster.sh)."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from neuromf.errors import UserError
from neuromf.pipeline.ablate import AblateReport, Cluster, ablate, collect, open_ablation, status
from neuromf.pipeline.ablation.job_notes import Task, alive, read_queue, tasks_of

pytestmark = pytest.mark.slow

Write = Callable[..., Path]
Command = tuple[str, ...]
Calls = Callable[[], list[str]]
PATIENCE_S = 300
SMALLEST = """
preset: demo
phantoms: {heads: 12, size: 16, spacing_mm: 12.0, autoencoder: haar}
settings:
  network: {channels: [8, 16], attention_levels: [false, true], norm_groups: 4, head_channels: 8, patch: 1}
  training: {updates: 4, batch_size: 2}
grid: {objective.prediction: [x, u]}
sample: {n: 3}
evaluate: {autoencoder: haar}
metric: kid_builtin
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[None]:
    """A running cluster, which all commands of SLURM are pointed at."""
    absent = [name for name in ("sbatch", "slurmctld", "slurmd", "munged") if shutil.which(name) is None]
    if absent:
        pytest.skip(f"SLURM is not here ({', '.join(absent)}): apt-get install -y slurm-wlm munge")
    pytest.importorskip("submitit", reason="no submitit: pip install 'neuromf[slurm]'")
    folder = tmp_path_factory.mktemp("cluster")
    script = str(repository / "tests/slurm/cluster.sh")
    # Daemons keep the streams they are born with: a pipe would never end.
    with (folder / "start.log").open("w") as log:
        started = subprocess.run([script, "start", str(folder)], stdout=log, stderr=subprocess.STDOUT, check=False)
    assert started.returncode == 0, (folder / "start.log").read_text()
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    try:
        yield
    finally:
        os.environ.pop("SLURM_CONF") if before is None else os.environ.update(SLURM_CONF=before)
        subprocess.run([script, "stop", str(folder)], check=True, timeout=60)


@pytest.fixture
def submit(
    slurm: None, plan_file: Write, tmp_path: Path, stand_in: Command, calls: Calls
) -> Callable[..., AblateReport]:
    plan = str(plan_file())

    def call(cluster: Cluster = Cluster(), **options: Any) -> AblateReport:
        return ablate(plan, tmp_path / "out", cluster=cluster, command=stand_in, **options)

    return call


@pytest.fixture
def queue(slurm: None, plan_file: Write, tmp_path: Path) -> Callable[[], dict[str, Task]]:
    """What the queue holds of the ablation, by stage."""
    ablation = open_ablation(str(plan_file()), tmp_path / "out")
    return lambda: alive(tasks_of(ablation.stages, tmp_path / "out/logs"))


def until(happens: Callable[[], Any], what: str) -> Any:
    """Wait for something to be true."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := happens()):
        assert time.monotonic() < deadline, f"{what} did not happen within {PATIENCE_S} s: {read_queue()}"
        time.sleep(0.3)
    return found


def restarts(job: str) -> int:
    text = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=True).stdout
    return int(text.split("Restarts=")[1].split()[0])


def test_all_is_done_once_in_order_however_often_it_is_submitted(
    submit: Callable[..., AblateReport], queue: Callable[[], Any], calls: Calls, plan_file: Write, tmp_path: Path
) -> None:
    first = submit(Cluster(partition="main", at_once=2, cpus=1)).submission
    assert first is not None
    assert len(first.submitted) == 28
    again = submit().submission
    assert again is not None
    assert again.submitted == {}
    until(lambda: not queue(), "the end of all jobs")
    report = submit()
    assert report.states == {"finished": 12}
    assert report.results is not None
    verbs = [line.split()[0] for line in calls()]
    assert verbs[:3] == ["render", "encode", "train"]
    assert {verb: verbs.count(verb) for verb in set(verbs)} == {
        "render": 1, "encode": 1, "train": 8, "sample": 9, "evaluate": 9,
    }  # fmt: skip
    assert collect(open_ablation(str(plan_file()), tmp_path / "out")).cells


def test_a_stage_that_exits_75_goes_back_to_the_queue_and_the_rest_waits_for_it(
    submit: Callable[..., AblateReport], queue: Callable[[], Any], calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_STOPS", "training.seed=1")
    found = submit().submission
    assert found is not None
    until(lambda: not queue(), "the end of all jobs")
    assert submit().states == {"finished": 12}
    trained = [line for line in calls() if line.startswith("train")]
    assert sum("training.seed=1" in line for line in trained) == 4 * 2
    assert len(trained) == 8 + 4
    jobs = [job for stage, job in found.submitted.items() if stage.endswith(".train")]
    assert sorted(restarts(job) for job in jobs) == [0] * 4 + [1] * 4  # the last of an array goes back alone, too


def test_the_signal_before_the_time_limit_saves_and_requeues(
    submit: Callable[..., AblateReport], queue: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_SECONDS", "600")
    found = submit(Cluster(at_once=1, time="2", more={"signal": "USR1@60"})).submission
    assert found is not None
    stages = {stage: job for stage, job in found.submitted.items() if stage.endswith(".train")}
    stage = until(lambda: next((s for s, job in stages.items() if restarts(job)), None), "a requeue")
    log = (tmp_path / f"out/logs/{stage}.log").read_text().splitlines()
    assert log[1] == "saved"
    assert queue()[stage].state in ("PENDING", "RUNNING", "COMPLETING")
    assert not list((tmp_path / "out/logs").glob("*.failed.json"))
    subprocess.run(["scancel", "--me"], check=True)
    until(lambda: not queue(), "the end of all jobs")


def test_cancelled_jobs_are_submitted_again_and_nothing_else(
    submit: Callable[..., AblateReport],
    queue: Callable[[], Any],
    calls: Calls,
    plan_file: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STAND_IN_SECONDS", "600")
    first = submit(Cluster(at_once=2)).submission
    assert first is not None
    stage = until(
        lambda: next((s for s, task in queue().items() if s.endswith(".train") and task.state == "RUNNING"), None),
        "the first training",
    )
    time.sleep(2)
    subprocess.run(["scancel", first.submitted[stage]], check=True)
    run = stage.removesuffix(".train")
    until(lambda: not any(name.startswith(run) for name in queue()), "the end of what needs the cancelled job")
    said = [cell["queue"] for cell in status(open_ablation(str(plan_file()), tmp_path / "out"))["cells"]]
    assert f"cancelled ({first.submitted[stage]})" in said
    monkeypatch.setenv("STAND_IN_SECONDS", "0")
    second = submit().submission
    assert second is not None
    assert stage in second.submitted
    assert {name.rsplit(".", 1)[0] for name in second.submitted} == {run}
    # Cancelled and not put back by its own script, although the stage saved itself and said 75.
    until(lambda: not any(name.startswith(run) for name in queue()), "the end of the cancelled cell's second round")
    assert status(open_ablation(str(plan_file()), tmp_path / "out"))["counts"]["finished"] >= 1
    subprocess.run(["scancel", "--me"], check=True)
    until(lambda: not queue(), "the end of all jobs")


def test_a_failing_cell_ends_what_needs_it_and_no_other_and_is_retried_when_asked(
    submit: Callable[..., AblateReport], queue: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_FAILS", "objective.lp=3.0")
    submit()
    until(lambda: not queue(), "the end of all jobs")
    report = submit()
    assert report.states == {"finished": 10, "failed: train": 2}
    assert "error: the loss is not finite" in report.failed[0]
    assert report.submission is not None
    assert report.submission.submitted == {}
    monkeypatch.delenv("STAND_IN_FAILS")
    retried = submit(retry=True).submission
    assert retried is not None
    assert len(retried.submitted) == 2 * 3
    until(lambda: not queue(), "the end of all jobs")
    assert submit().states == {"finished": 12}


def test_a_partition_that_does_not_exist_is_refused_by_slurm_and_named(submit: Callable[..., AblateReport]) -> None:
    with pytest.raises(UserError, match="invalid partition specified: nowhere") as refusal:
        submit(Cluster(partition="nowhere"))
    assert refusal.value.hint == "--partition takes one of: main"


def test_the_smallest_plan_is_trained_sampled_and_evaluated_by_jobs(
    slurm: None, plan_file: Write, tmp_path: Path
) -> None:
    plan, out = str(plan_file(SMALLEST)), tmp_path / "out"
    ablate(plan, out, cluster=Cluster(at_once=1, cpus=1), device="cpu")
    ablation = open_ablation(plan, out)
    until(lambda: not alive(tasks_of(ablation.stages, out / "logs")), "the end of all jobs")
    report = ablate(plan, out, cluster=Cluster())
    assert report.failed == []
    assert report.states == {"finished": 2}
    assert report.results is not None
