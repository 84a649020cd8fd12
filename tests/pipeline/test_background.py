from __future__ import annotations

import threading
import time

import pytest

from neuromf.pipeline.background import Background


def test_no_more_than_the_bound_is_ever_unfinished() -> None:
    lock, unfinished, seen = threading.Lock(), 0, []

    def job() -> None:
        nonlocal unfinished
        time.sleep(0.002)
        with lock:
            unfinished -= 1

    with Background(threads=2, waiting=3) as background:
        for _ in range(20):
            with lock:
                unfinished += 1
                seen.append(unfinished)
            background.add(job)
    assert unfinished == 0
    assert 2 <= max(seen) <= 4  # three given, and the one about to be


def test_jobs_run_while_the_caller_goes_on() -> None:
    begun = threading.Event()
    with Background(threads=1, waiting=1) as background:
        background.add(begun.set)
        assert begun.wait(5)


def test_an_error_reaches_the_caller_at_the_next_job_or_at_the_end() -> None:
    def fail() -> None:
        raise ValueError("full")

    with pytest.raises(ValueError, match="full"), Background(threads=1, waiting=9) as background:
        background.add(fail)
    done: list[int] = []
    with Background(threads=1, waiting=1) as background:
        background.add(fail)
        with pytest.raises(ValueError, match="full"):
            background.add(done.append, 1)
    assert done == []


def test_an_interrupted_caller_does_not_wait_for_what_has_not_begun() -> None:
    hold, done = threading.Event(), []

    def first() -> None:
        hold.wait(5)
        done.append("first")

    def interrupted() -> None:
        with Background(threads=1, waiting=9) as background:
            background.add(first)
            background.add(done.append, "second")
            threading.Timer(0.05, hold.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == ["first"]
