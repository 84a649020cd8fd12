"""Several runs at once: each is trained in a process of its own, and shows its progress under its name."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import torch

from neuromf.errors import Interrupted, UserError
from neuromf.pipeline.workers import cores
from neuromf.training.interrupts import StopRequest

LINE_EVERY_S = 15.0
_POLL_S = 0.2


class Job(NamedTuple):
    """A run to train: what lines of its progress begin with, and the work, which is told its listener.

    The work travels to another process: a function of a module, or a `functools.partial` of one.
    """

    name: str
    work: Callable[[Any], Any]


def side_by_side(jobs: Sequence[Job], processes: int, listener: Any) -> None:
    """Do jobs in up to so many processes that share the processor's cores; what they wrote is the result.

    Two networks too small for two cores train faster beside each other than one after the other. A stopping signal
    reaches every process: each saves its run and ends. So does the failure of one.

    Args:
        jobs: in the order in which they begin.
        processes: at a time.
        listener: its `message` takes the lines of all.

    Raises:
        UserError: of the first run that failed; GuardError and Interrupted are such.
    """
    spawn = multiprocessing.get_context("spawn")  # a forked process would inherit torch's threads, and hang
    lines, stop = spawn.Queue(), spawn.Event()
    processes = min(processes, len(jobs))
    threads = max(1, cores() // processes)
    pool = ProcessPoolExecutor(processes, spawn, _begin, (lines, stop, threads, os.getpid()))
    with pool, StopRequest(patient=True) as request:
        futures = [pool.submit(_work, job) for job in jobs]
        try:
            while not all(future.done() for future in futures):
                _pass_on(lines, listener)
                if request.number or _failure(futures):
                    stop.set()
        finally:
            stop.set()
    _pass_on(lines, listener)
    if failure := _failure(futures):
        raise failure


def _failure(futures: Sequence[Future[None]]) -> BaseException | None:
    """What ended the first run that failed; an interruption only if nothing worse happened."""
    failures = [e for future in futures if future.done() and (e := future.exception()) is not None]
    failures.sort(key=lambda error: isinstance(error, Interrupted))
    if failures and isinstance(failures[0], BrokenProcessPool):
        return UserError(
            "a process that trained was ended from outside, perhaps for want of memory",
            "run the same command again to continue; if memory is short, on one core: taskset -c 0 neuromf ...",
        )
    return failures[0] if failures else None


def _pass_on(lines: Any, listener: Any) -> None:
    """Show the lines that have come, or wait a moment for one."""
    wait_s = _POLL_S
    while True:
        try:
            listener.message(lines.get(timeout=wait_s))
        except queue.Empty:
            return
        wait_s = 0.0


# --- in the processes ----------------------------------------------------------------------------------------


class _Process(NamedTuple):
    """What a process was told at its start."""

    lines: Any
    stop: Any
    parent: int


_process: _Process | None = None


def _begin(lines: Any, stop: Any, threads: int, parent: int) -> None:
    """Once per process: its share of the cores, and no Ctrl-C of its own (the parent passes it on)."""
    global _process
    _process = _Process(lines, stop, parent)
    torch.set_num_threads(threads)
    if hasattr(os, "setsid"):
        os.setsid()


def _work(job: Job) -> None:
    assert _process is not None, "the pool calls _begin first"
    relay = Relay(job.name, _process)
    if relay.unwanted():
        raise Interrupted(f"{relay.name} did not begin", "run the same command again to continue")
    job.work(relay)


class Relay:
    """The listener of a run in its process: lines under the run's name, an update every 15 s and the last.

    Args:
        name: of the run.
        process: where the lines go, and who may stop the run.
    """

    def __init__(self, name: str, process: _Process) -> None:
        self.name, self.process = name, process
        self._shown_s, self._stopping = time.monotonic(), False

    def message(self, text: str) -> None:
        """Send lines of text; warnings still begin with "warning:"."""
        for line in text.splitlines():
            warning = line.removeprefix("warning: ")
            self.process.lines.put(f"{self.name}: {line}" if warning == line else f"warning: {self.name}: {warning}")

    def step(self, record: Mapping[str, Any]) -> None:
        """Send an update now and then; have the run save itself and end once it is unwanted."""
        if self.unwanted() and not self._stopping:
            self._stopping = True
            signal.raise_signal(signal.SIGTERM)
        now, last = time.monotonic(), record["update"] == record["updates"]
        if last or now - self._shown_s >= LINE_EVERY_S:
            self._shown_s = now
            left = "" if last else f", {record['eta_s']:.0f} s left"
            self.message(f"update {record['update']}/{record['updates']}, raw loss {record['raw_loss']:.4g}{left}")

    def unwanted(self) -> bool:
        """Whether the parent wants no more, or is no more."""
        return self.process.stop.is_set() or os.getppid() != self.process.parent
