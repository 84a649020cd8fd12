from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from neuromf.errors import UserError
from neuromf.pipeline.workers import ahead

PARENT = """
import sys, time
from neuromf.pipeline.workers import ahead
if __name__ == "__main__":
    for result in ahead(str, range(10_000_000), 2):
        print(result, flush=True)
        time.sleep(0.1)
"""


def test_one_process_does_a_task_when_its_result_is_wanted():
    asked = []
    results = ahead(lambda n: asked.append(n) or n, range(5), 1)
    assert [next(results), next(results)] == asked == [0, 1]


def test_processes_give_results_in_order_and_take_few_tasks_ahead():
    taken = []

    def tasks():
        for n in range(40):
            taken.append(n)
            yield n

    results = ahead(str, tasks(), 2)
    assert next(results) == "0"
    assert len(taken) <= 5
    assert list(results) == [str(n) for n in range(1, 40)]


def test_a_killed_process_is_told_and_an_error_of_one_reaches_the_caller():
    results = ahead(len, ["a", "bb", 3, "c"], 2)
    assert [next(results), next(results)] == [1, 2]
    with pytest.raises(TypeError, match="has no len"):
        next(results)
    results = ahead(time.sleep, [0.001] * 10_000, 2)
    next(results)
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(UserError, match="was killed"):
        list(results)


def test_processes_end_with_a_parent_that_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "0\n"
        children = psutil.Process(parent.pid).children(recursive=True)
        assert len(children) >= 2
        os.kill(parent.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
