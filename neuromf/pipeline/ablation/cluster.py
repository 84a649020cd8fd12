"""The launcher of clusters: stages become jobs of SLURM through submitit, and the launcher's work ends there.

Each job waits for those it needs. A stage that was stopped (code 75, as before a time limit) goes back to the queue by
the last lines of its own job's script.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, field
from io import StringIO
from typing import Any, NamedTuple

from neuromf.errors import EXIT_RESUME, UserError
from neuromf.pipeline.ablation.batches import batches, dependency
from neuromf.pipeline.ablation.job import StageJob
from neuromf.pipeline.ablation.job_notes import JobNote, Task, alive, ask, note_job, stop_command, tasks_of
from neuromf.pipeline.ablation.local import COMMAND
from neuromf.pipeline.ablation.stage_logs import Failure, failure_of, forget_failure
from neuromf.pipeline.ablation.stages import Place, Stage

SIGNAL = "USR1@300"
"""What a job gets before its time is over, and how many seconds before: SLURM counts from the step's tasks."""
MOST_REQUEUES = 100
FOLDER = "slurm"
SHARED_WORK = ("train", "encode", "sample")
"""Verbs that divide their work among several processes, one for each GPU."""
OURS = {"array", "dependency", "error", "job-name", "open-mode", "output", "requeue", "no-requeue"}

# srun no longer takes over the cores that sbatch was asked for (since SLURM 22.05).
_BEFORE = ["export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}"]
_AFTER = [
    "code=$?",
    f'if [ $code -eq {EXIT_RESUME} ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {MOST_REQUEUES} ]; then',
    # The last task of an array has the number of the array itself, which would put back all of them.
    '    scontrol requeue "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"',
    "fi",
    "exit $code",
]

Message = Callable[[str], None]


@dataclass(frozen=True)
class Cluster:
    """What is asked of SLURM for each job; what is None is left to the cluster's own defaults.

    Attributes:
        partition: of nodes.
        time: a job's limit, as sbatch reads it: minutes, H:MM:SS or D-HH:MM:SS. Longer stages go on in another round.
        gpus: of each job. Stages that can divide their work start a process on each; evaluations take one.
        cpus: cores of each process.
        memory_gib: of each job.
        at_once: how many tasks of an array run at a time.
        more: further options of sbatch; True for those without a value.
    """

    partition: str | None = None
    time: str | None = None
    gpus: int = 0
    cpus: int | None = None
    memory_gib: float | None = None
    at_once: int | None = None
    more: Mapping[str, str | bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        taken = sorted(OURS.intersection(self.more))
        if taken:
            raise UserError(f"{', '.join(taken)} cannot be given to sbatch: `neuromf ablate` sets it", "leave it out")

    def parameters(self, verb: str) -> dict[str, Any]:
        """As submitit's executor for SLURM takes them, for jobs of one verb."""
        gpus = self.gpus if verb in SHARED_WORK else 0 if verb == "render" else min(self.gpus, 1)
        asked = {
            "partition": self.partition,
            "cpus_per_task": self.cpus,
            "gpus_per_node": gpus or None,
            "ntasks_per_node": max(gpus, 1),
            "array_parallelism": self.at_once,
        }
        more: dict[str, Any] = {"signal": SIGNAL, "requeue": True, "kill-on-invalid-dep": "yes"}
        more |= {"time": self.time} if self.time else {}
        more |= {"mem": f"{round(self.memory_gib * 1024)}M"} if self.memory_gib else {}
        known = {key: value for key, value in asked.items() if value is not None}
        # Without a word on time submitit would ask for five minutes.
        return {
            **known,
            "time": None,
            "setup": _BEFORE,
            "teardown": _AFTER,
            "additional_parameters": {**more, **self.more},
        }


class Submission(NamedTuple):
    """What became of the stages: how many were submitted now, are in the queue, or have failed."""

    submitted: dict[str, str]
    queued: dict[str, Task]
    failures: list[Failure]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: jobs by the names of their stages."""
        return {"submitted": self.submitted, "queued": {stage: task.job for stage, task in self.queued.items()}}

    def lines(self) -> list[str]:
        """How many, and what to type next."""
        counts = f"{len(self.submitted)} stages submitted, {len(self.queued)} were in the queue already"
        waiting = self.submitted or self.queued
        return [counts, *(["--status says how far they are, --collect makes the tables"] if waiting else [])]


def submit(
    stages: Sequence[Stage],
    place: Place,
    cluster: Cluster,
    *,
    name: str,
    retry: bool = False,
    message: Message = lambda _: None,
    command: Sequence[str] = COMMAND,
) -> Submission:
    """Put into the queue what is neither finished, nor there already, nor failed (or needs what failed).

    Args:
        stages: each after those it needs.
        place: where logs, notes and what submitit writes go; seen from all nodes.
        cluster: what is asked for.
        name: that jobs begin with.
        retry: also what failed before.
        message: hears of every submission.
        command: what comes before the words of a stage.

    Raises:
        UserError: no SLURM, no submitit, or a submission that SLURM refuses; the same call does what is left.
    """
    _check()
    queued = alive(tasks_of(stages, place.logs))
    if retry:
        for stage in stages:
            if stage.name not in queued:
                forget_failure(stage.name, place.logs)
    wanted, failures = _missing(stages, place, queued)
    jobs = {stage: task.job for stage, task in queued.items()}
    submitted: dict[str, str] = {}
    for batch in batches(wanted, jobs):
        try:
            ids = _submit_batch(batch, place, cluster, jobs, name, command)
        except UserError as error:
            done = f"{len(submitted)} of {len(wanted)} stages were submitted before; the same command submits the rest"
            raise UserError(error.message, f"{error.hint}\n{done}" if submitted else error.hint) from error
        found = dict(zip((stage.name for stage in batch), ids, strict=True))
        jobs, submitted = {**jobs, **found}, {**submitted, **found}
        message(f"{batch[0].words[0]}: {len(batch)} stages submitted as job {ids[0].partition('_')[0]}")
    return Submission(submitted, queued, failures)


def refuse_queued(stages: Sequence[Stage], place: Place) -> None:
    """Keep a launcher that works here from what jobs work at.

    Raises:
        UserError: there are such jobs, or it cannot be known.
    """
    try:
        tasks = alive(tasks_of(stages, place.logs))
    except UserError as error:
        hint = f"{error.hint}; where its jobs are over for certain, delete {place.logs}/*.job.json"
        raise UserError(f"stages of {place.out} were submitted to SLURM, and {error.message}", hint) from error
    if tasks:
        stop = stop_command(list(tasks.values()))
        raise UserError(
            f"{len(tasks)} stages of {place.out} are in SLURM's queue",
            f"wait for them (`--status`), go on with --launcher slurm, or end them: {stop}",
        )


def _check() -> None:
    """Whether there is all that submitting needs."""
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise UserError(
            "--launcher slurm needs submitit, which is not installed",
            "pip install 'neuromf[slurm]', or --launcher local",
        ) from None
    absent = [program for program in ("sbatch", "srun", "squeue") if shutil.which(program) is None]
    if absent:
        raise UserError(
            f"--launcher slurm needs SLURM's commands; not here: {', '.join(absent)}",
            "run it where jobs are submitted, usually a login node of the cluster, or give --launcher local",
        )


def _missing(stages: Sequence[Stage], place: Place, queued: Mapping[str, Task]) -> tuple[list[Stage], list[Failure]]:
    """(stages to submit, failures): a failed stage keeps back those that need it."""
    wanted: list[Stage] = []
    failures: list[Failure] = []
    back: set[str] = set()
    for stage in stages:
        if stage.finished() or stage.name in queued:
            continue
        failure = failure_of(stage.name, place.logs)
        if failure is None and not back.intersection(stage.needs):
            wanted.append(stage)
            continue
        back.add(stage.name)
        failures += [failure] if failure is not None else []
    return wanted, failures


def _submit_batch(
    batch: Sequence[Stage], place: Place, cluster: Cluster, jobs: Mapping[str, str], name: str, command: Sequence[str]
) -> list[str]:
    """Submit an array, or a single job; returns the ids of its tasks."""
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    verb, logs = batch[0].words[0], place.logs.resolve()
    waits = dependency([next((jobs[need] for need in stage.needs if need in jobs), "") for stage in batch])
    job_name = f"{name}.{verb}.{uuid.uuid4().hex[:8]}"
    executor = SlurmExecutor((place.out / FOLDER).resolve())
    executor.update_parameters(job_name=job_name, dependency=waits or None, **cluster.parameters(verb))
    for number, stage in enumerate(batch):
        note_job(stage.name, JobNote(job_name, number if len(batch) > 1 else -1), place.logs)
    said = StringIO()
    try:
        with redirect_stderr(said):
            found = executor.submit_array([StageJob(s.name, tuple(command), s.words, logs) for s in batch])
    except (FailedJobError, FailedSubmissionError, OSError) as error:
        raise _refused(said.getvalue().strip() or str(error)) from error
    return [job.job_id for job in found]


def _refused(said: str) -> UserError:
    """What sbatch did not like, and what it would."""
    faults = [line.removeprefix("sbatch: error: ") for line in said.splitlines() if line]
    hint = "`man sbatch` says what the options take"
    if "partition" in said:
        with suppress(UserError):
            hint = f"--partition takes one of: {', '.join(ask('sinfo', '--noheader', '--format=%R').split())}"
    return UserError(f"SLURM refuses the job: {'; '.join(faults)}", hint)
