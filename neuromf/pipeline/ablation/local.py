"""The local launcher: several stages at once, each a process of its own, so that none takes another down."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from neuromf.errors import EXIT_RESUME, Interrupted, UserError
from neuromf.pipeline.ablation.stage_logs import (
    Failure,
    begin_log,
    failed,
    failure_of,
    forget_failure,
    note_failure,
    stage_environment,
)
from neuromf.pipeline.ablation.stages import Place, Stage
from neuromf.training.interrupts import StopRequest

try:
    import fcntl
except ImportError:  # where there are no such locks
    fcntl = None  # type: ignore[assignment]

COMMAND = (sys.executable, "-m", "neuromf_cli")
PATIENCE_S = 120.0
"""How long a stage may take to save itself once it is asked to stop."""
_POLL_S = 0.1
_ORPHANS_S = 60.0
_LOCK = ".lock"

Message = Callable[[str], None]


class _Going(NamedTuple):
    """A stage at work."""

    stage: Stage
    process: subprocess.Popen[bytes]
    log: IO[bytes]


def launch(
    stages: Sequence[Stage],
    place: Place,
    lock: int,
    *,
    jobs: int = 1,
    retry: bool = False,
    message: Message = lambda _: None,
    command: Sequence[str] = COMMAND,
) -> list[Failure]:
    """Do what is not finished yet, `jobs` stages at once; returns those that failed, now or in an earlier call.

    A failed stage keeps back only those that need it. A stopping signal is passed on: each stage saves itself and
    ends. On Linux they end, too, when this process is killed.

    Args:
        stages: each after those it needs.
        place: where logs and notes of failures go.
        lock: of the folder (see `alone`); stages inherit it.
        jobs: how many at once; they share the processor's cores.
        retry: also do again what failed before.
        message: hears of every stage's beginning and end.
        command: what comes before the words of a stage.

    Raises:
        Interrupted: by a signal; the same call continues.
    """
    with StopRequest(patient=True) as request:
        if retry:
            for stage in stages:
                forget_failure(stage.name, place.logs)
        queue = _Queue(stages, place)
        going: list[_Going] = []
        try:
            while not request.number:
                following = queue.next() if len(going) < jobs else None
                if following is not None:
                    going.append(_start(following, place, jobs, lock, command))
                    message(f"{following.name}: begins ({queue.left()} after it)")
                elif not going:
                    break
                else:
                    time.sleep(_POLL_S)
                for one in [one for one in going if one.process.poll() is not None]:
                    going.remove(one)
                    queue.settle(one.stage, _ended(one, place, message))
        finally:
            _stop(going)
        if request.number:
            raise Interrupted(f"stopped with {queue.left() + len(going)} stages to do", "the same command continues")
        return list(queue.failures.values())


class _Queue:
    """Which stage can be done next; a stage that failed before has failed."""

    def __init__(self, stages: Sequence[Stage], place: Place) -> None:
        self.stages = {stage.name: stage for stage in stages}
        self.done = {stage.name for stage in stages if stage.finished()}
        notes = {s.name: failure_of(s.name, place.logs) for s in stages if s.name not in self.done}
        self.failures = {name: failure for name, failure in notes.items() if failure is not None}
        self._begun: set[str] = set()

    def next(self) -> Stage | None:
        """The first stage that waits for nothing; it counts as begun."""
        taken = self.done | self.failures.keys() | self._begun
        found = next((s for s in self.stages.values() if s.name not in taken and self.done.issuperset(s.needs)), None)
        self._begun |= {found.name} if found else set()
        return found

    def settle(self, stage: Stage, failure: Failure | None) -> None:
        """Take note of how a stage ended."""
        if failure is None:
            self.done.add(stage.name)
        else:
            self.failures[stage.name] = failure

    def left(self) -> int:
        """How many are still to begin, without those that need a failed one."""
        blocked = set(self.failures)
        for stage in self.stages.values():
            if blocked.intersection(stage.needs):
                blocked.add(stage.name)
        return len(self.stages.keys() - self.done - self._begun - blocked)


def _start(stage: Stage, place: Place, jobs: int, lock: int, command: Sequence[str]) -> _Going:
    log = begin_log(stage.name, stage.words, place.logs)
    process = subprocess.Popen(
        [*command, *stage.words],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=stage_environment(os.environ, share=jobs),
        start_new_session=True,  # the terminal's Ctrl-C reaches us alone, and is passed on once
        pass_fds=(lock,),  # while it lives, no other launcher works here, even if this one is killed
        preexec_fn=_die_with_parent if sys.platform == "linux" else None,
    )
    return _Going(stage, process, log)


def _die_with_parent() -> None:
    """Have the kernel send SIGTERM if the launcher dies (Linux)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _ended(one: _Going, place: Place, message: Message) -> Failure | None:
    """How a stage ended: well if its last file is there; else what is known of its failure, noted for later calls."""
    code, name = one.process.wait(), one.stage.name
    one.log.close()
    failure = failed(name, code, place.logs)
    if one.stage.finished():  # 4 means remarks, and the log has them
        message(f"{name}: finished" + ("" if code == 0 else f" with remarks, see {failure.log}"))
        return None
    if code == EXIT_RESUME:  # goes on without being asked
        failure = failure._replace(reason="stopped from outside")
    else:
        note_failure(failure, place.logs)
    message(f"warning: {name}: failed, {failure.reason}")
    return failure


def _stop(going: Sequence[_Going]) -> None:
    """Ask stages to save themselves, wait for them, and end those that do not."""
    for one in going:
        if one.process.poll() is None:
            one.process.terminate()
    for one in going:
        try:
            one.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            one.process.kill()
            one.process.wait()
        one.log.close()


@contextmanager
def alone(out: Path, message: Message, patience_s: float = _ORPHANS_S) -> Iterator[int]:
    """Hold the folder's lock, which stages inherit; a killed launcher's stages are waited for.

    Raises:
        UserError: another launcher holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline, told = time.monotonic() + patience_s, False
        while not _locked(descriptor):
            if not told:
                message(f"waiting for another `neuromf ablate`, or what a killed one left, in {out}")
                told = True
            if time.monotonic() > deadline:
                raise UserError(
                    f"another `neuromf ablate` is at work in {out}",
                    "`--status` shows how far it is; or give another --out",
                )
            time.sleep(_POLL_S)
        yield descriptor
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks
    return True
