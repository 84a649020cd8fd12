"""Which job a stage was given to, and what the cluster's queue says of it.

A note says under which name a stage was submitted, and is written before it is: whatever kills the launcher, the queue
can be asked. Whether a stage is finished is never asked of the queue, but of the stage's files.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from neuromf.errors import UserError
from neuromf.files import read_json, write_json
from neuromf.pipeline.ablation.stages import Stage

ENDED = {
    *(
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
    ),
    "TIMEOUT",
}
"""States of jobs that SLURM still lists and will not run again."""
_PATIENCE_S = 60


class JobNote(NamedTuple):
    """Where a stage was submitted.

    Attributes:
        name: of the job, which no other submission has.
        place: in the array; -1 for a job that is none.
    """

    name: str
    place: int


class Task(NamedTuple):
    """A job, or one of an array, as `squeue` lists it."""

    job: str
    state: str
    reason: str
    name: str

    @property
    def alive(self) -> bool:
        """Whether it runs or will run."""
        return self.state not in ENDED

    def __str__(self) -> str:
        waits = f", {self.reason}" if self.state == "PENDING" and self.reason not in ("", "None") else ""
        return f"{self.state.lower()} ({self.job}{waits})"


def note_file(stage: str, logs: Path) -> Path:
    """Where it is noted which job a stage was given to."""
    return logs / f"{stage}.job.json"


def note_job(stage: str, note: JobNote, logs: Path) -> None:
    """Keep it for later calls."""
    write_json(note_file(stage, logs), note._asdict())


def job_of(stage: str, logs: Path) -> JobNote | None:
    """Where a stage was submitted; None if it never was."""
    try:
        return JobNote(**read_json(note_file(stage, logs)))
    except (UserError, TypeError):
        return None


def tasks_of(stages: Iterable[Stage], logs: Path) -> dict[str, Task | None]:
    """What the queue says of each unfinished stage that was submitted; None where it knows nothing of it any more.

    SLURM itself is asked only if there is such a stage.

    Raises:
        UserError: SLURM is not here, or does not answer.
    """
    notes = {stage.name: job_of(stage.name, logs) for stage in stages if not stage.finished()}
    submitted = {name: note for name, note in notes.items() if note is not None}
    if not submitted:
        return {}
    listed = {(task.name, _place(task)): task for task in read_queue()}
    return {name: listed.get(note) for name, note in submitted.items()}


def read_queue() -> list[Task]:
    """The user's jobs that SLURM has in mind: waiting, running, and for some minutes those that have ended.

    Raises:
        UserError: SLURM is not here, or does not answer.
    """
    lines = ask("squeue", "--me", "--array", "--states=all", "--noheader", "--format=%i|%T|%r|%j").splitlines()
    return [Task(*line.split("|", 3)) for line in lines]


def ask(*words: str) -> str:
    """What a command of SLURM prints.

    Raises:
        UserError: there is none, or it fails.
    """
    if shutil.which(words[0]) is None:
        raise UserError(
            f"{words[0]} is not on this machine: SLURM has to be asked about jobs",
            "run this where jobs are submitted, usually a login node of the cluster",
        )
    try:
        answer = subprocess.run(words, capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(f"{words[0]} gives no answer within {_PATIENCE_S} s", "try again later") from None
    if answer.returncode:
        raise UserError(f"{words[0]} failed: {answer.stderr.strip()}", "nothing was changed; try again later")
    return answer.stdout


def _place(task: Task) -> int:
    """The task's number in its array; -1 for a job that is none."""
    place = task.job.partition("_")[2]
    return int(place) if place.isdecimal() else -1


def alive(tasks: dict[str, Task | None]) -> dict[str, Task]:
    """Those that run or will run, by their stages."""
    return {name: task for name, task in tasks.items() if task is not None and task.alive}


def stop_command(tasks: Sequence[Task]) -> str:
    """What cancels jobs."""
    return "scancel " + " ".join(dict.fromkeys(task.job.partition("_")[0] for task in tasks))
