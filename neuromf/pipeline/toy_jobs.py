"""Several trials at once: each is trained in a process of its own, and shows its progress under its name."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import torch

from neuromf.config import TrainConfig
from neuromf.errors import Interrupted, UserError
from neuromf.pipeline.toy_problems import Problem, blob_problem, flat_problem
from neuromf.pipeline.train import TrainingData, train_on
from neuromf.training.interrupts import StopRequest
from neuromf.training.loop import TrainResult

LINE_EVERY_S = 15.0
_POLL_S = 0.2


class Task(NamedTuple):
    """One run to train; its folder's name is what progress lines begin with."""

    config: TrainConfig
    folder: Path
    cells: int
    device: str


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def problem_of(task: Task) -> Problem:
    """Points for an `mlp`, volumes for every other network; drawn from the run's seed."""
    seed = task.config.training.seed
    return flat_problem(seed) if task.config.network.name == "mlp" else blob_problem(seed, task.cells)


def train_task(task: Task, problem: Problem, listener: Any) -> TrainResult:
    """Train one run, or go on with it, in this process."""
    data = TrainingData(problem.description(), problem.split.train, problem.split.held_back)
    return train_on(task.config, data, task.folder, device=task.device, listener=listener)


def train_at_once(tasks: Sequence[Task], jobs: int, listener: Any) -> None:
    """Train runs in up to `jobs` processes that share the processor's cores; what they wrote is the result.

    A stopping signal reaches every process: each saves its run and ends. So does the failure of one.

    Args:
        tasks: in the order in which they begin.
        jobs: processes at a time.
        listener: its `message` takes the lines of all.

    Raises:
        UserError: of the first run that failed; GuardError and Interrupted are such.
    """
    spawn = multiprocessing.get_context("spawn")  # a forked process would inherit torch's threads, and hang
    lines, stop = spawn.Queue(), spawn.Event()
    threads = max(1, cores() // min(jobs, len(tasks)))
    pool = ProcessPoolExecutor(min(jobs, len(tasks)), spawn, _begin, (lines, stop, threads, os.getpid()))
    with pool, StopRequest(patient=True) as request:
        futures = [pool.submit(_train, task) for task in tasks]
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


def _failure(futures: Sequence[Future[TrainResult]]) -> BaseException | None:
    """What ended the first run that failed; an interruption only if nothing worse happened."""
    failures = [e for future in futures if future.done() and (e := future.exception()) is not None]
    failures.sort(key=lambda error: isinstance(error, Interrupted))
    if failures and isinstance(failures[0], BrokenProcessPool):
        return UserError(
            "a process that trained was ended from outside, perhaps for want of memory",
            "run the same command again to continue, with --jobs 1 if memory is short",
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


def _train(task: Task) -> TrainResult:
    assert _process is not None, "the pool calls _begin first"
    relay = Relay(task.folder.name, _process)
    if relay.unwanted():
        raise Interrupted(f"{relay.name} did not begin", "run the same command again to continue")
    return train_task(task, problem_of(task), relay)


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
