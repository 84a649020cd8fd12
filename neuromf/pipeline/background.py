"""Work that goes on in threads while the next thing is computed, with a bound on what waits."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from neuromf.pipeline.workers import cores

MOST_THREADS = 4


def writer_threads() -> int:
    """Threads that write: as many as this process has cores, up to a few."""
    return min(MOST_THREADS, cores())


class Background:
    """Runs jobs in threads, a few at a time; what one of them raises reaches the caller.

    Leaving the block waits for all jobs, or, where it is left by an exception, for those that have begun.

    Args:
        threads: jobs at a time.
        waiting: jobs given and not yet finished, at most; `add` waits for the oldest beyond that.
    """

    def __init__(self, threads: int, waiting: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="neuromf-writer")
        self._pending: deque[Future[Any]] = deque()
        self._waiting = waiting

    def __enter__(self) -> Background:
        return self

    def add(self, job: Callable[..., Any], *arguments: Any) -> None:
        """Give a job; raises what an earlier one raised."""
        while self._pending and (len(self._pending) >= self._waiting or self._pending[0].done()):
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(job, *arguments))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for future in self._pending:
                future.result()
