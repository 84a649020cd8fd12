"""What a stage said, and how it failed: a log and a note, by the stage's name. Whatever runs a stage writes them so.

Light on purpose: a job of a cluster imports no more than this.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from neuromf.errors import UserError
from neuromf.files import read_json, write_json

TAIL_LINES = 12


class Failure(NamedTuple):
    """A stage that failed: how, its log, and the end of it."""

    stage: str
    reason: str
    log: str
    tail: str


def log_file(stage: str, logs: Path) -> Path:
    """What a stage said in all its calls."""
    return logs / f"{stage}.log"


def failure_file(stage: str, logs: Path) -> Path:
    """Where it is noted that a stage failed."""
    return logs / f"{stage}.failed.json"


def failure_of(stage: str, logs: Path) -> Failure | None:
    """What ended a stage in an earlier call; None if it did not fail."""
    try:
        return Failure(**read_json(failure_file(stage, logs)))
    except (UserError, TypeError):
        return None


def begin_log(stage: str, words: Sequence[str], logs: Path) -> IO[bytes]:
    """The log of a stage, open at its end, after the command as a person would type it."""
    logs.mkdir(parents=True, exist_ok=True)
    log = log_file(stage, logs).open("ab")
    log.write(f"$ {shlex.join(['neuromf', *words])}\n".encode())
    log.flush()
    return log


def failed(stage: str, code: int, logs: Path) -> Failure:
    """How a stage failed, by its exit code as `subprocess` has it, with the end of its log."""
    reason = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return Failure(stage, reason, str(log_file(stage, logs)), _tail(log_file(stage, logs)))


def note_failure(failure: Failure, logs: Path) -> None:
    """Keep it for later calls."""
    write_json(failure_file(failure.stage, logs), failure._asdict())


def forget_failure(stage: str, logs: Path) -> None:
    """The stage is to be tried again."""
    failure_file(stage, logs).unlink(missing_ok=True)


def stage_environment(present: Mapping[str, str], share: int = 1) -> dict[str, str]:
    """Variables of a stage: its part of the cores it may use, unless the user says otherwise.

    Args:
        present: variables that stay as they are.
        share: how many stages use the same cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = int(present.get("SLURM_CPUS_PER_TASK", cores))
    return {"OMP_NUM_THREADS": str(max(1, cores // share)), "PYTHONUNBUFFERED": "1", **present}


def _tail(log: Path) -> str:
    """The last lines that a stage said in its latest call."""
    text = log.read_text(encoding="utf-8", errors="replace")
    return "\n".join(text[text.rfind("\n$ neuromf ") + 1 :].splitlines()[-TAIL_LINES:])
