"""Processes that read and prepare scans ahead of whoever takes the results; no torch, so they start in a second."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TypeVar

from neuromf.errors import UserError

T = TypeVar("T")
R = TypeVar("R")

_AHEAD = 2
"""Results that wait, per process: each may be a volume."""


def ahead(function: Callable[[T], R], tasks: Iterable[T], workers: int) -> Generator[R, None, None]:
    """`function` of each task, in their order, by processes that run ahead; 1 is this process alone, in turn.

    Closing it ends the processes once they have done what they are at.

    Args:
        function: can be pickled.
        tasks: taken one by one, a few before their results are.
        workers: processes.

    Raises:
        UserError: a process was killed, as the kernel does where memory runs out.
    """
    if workers == 1:
        yield from map(function, tasks)
        return
    # Spawned: a fork would inherit torch's threads, which may hold locks.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_begin) as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(function, task))
                if len(waiting) == _AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                "a process that read scans was killed; memory may have run out",
                f"use fewer processes: --workers {workers // 2}",
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def cores() -> int:
    """The cores this process may use, which a scheduler may have limited; its share of those of a launch."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, there // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _begin() -> None:
    """Leave Ctrl-C, which reaches the whole group, to the parent, and end with it however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    """A parent killed by -9 tells nobody, and its workers would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
