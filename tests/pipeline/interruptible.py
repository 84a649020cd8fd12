"""Runs `neuromf` over and over and interrupts it: a server for `test_kills`, a job and an answer per line of JSON.

Importing torch takes seconds, training a tiny network milliseconds. This process imports everything once and forks for
each job; the fork calls the command's entry point, as `python -m neuromf_cli` does after its imports. Forking is safe
here because the server has one thread: it computes nothing, and the thread pools of its libraries are switched off.

A job: {"words": [...], "log": FILE, "watch": FOLDER, "signal": NUMBER, "after_s": S or "at_operation": N}. Where the
last two are absent it runs to its end. `at_operation` interrupts just before the N-th time that the command opens,
makes, renames or removes something under FOLDER, so that the moments when a checkpoint is half written are met on any
machine, however fast. The answer: {"code": as of `subprocess`, "seconds": S, "operations": N}.
"""

from __future__ import annotations

import importlib
import json
import mmap
import os
import runpy
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Any

IMPORTED = (
    "neuromf_cli.commands.encode",
    "neuromf_cli.commands.train",
    "neuromf.data.augmentation",
    "neuromf.pipeline.encode",
    "neuromf.pipeline.train",
    "matplotlib.pyplot",
    "torch.utils.tensorboard",
    "torch._decomp.decompositions_for_jvp",  # which the first derivative would import
)
OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
COUNT = struct.Struct("q")


def serve() -> None:
    """Answer jobs until stdin ends."""
    for name in IMPORTED:
        importlib.import_module(name)
    print(json.dumps({"threads": len(list(Path("/proc/self/task").iterdir()))}), flush=True)
    while line := sys.stdin.readline():
        print(json.dumps(run(json.loads(line))), flush=True)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One command in a fork of its own."""
    with mmap.mmap(-1, COUNT.size) as count:  # shared with the fork, and readable when that is dead
        began = time.perf_counter()
        pid = os.fork()
        if not pid:
            become(job, count)
        if "after_s" in job and not _ended(pid, began + job["after_s"]):
            os.kill(pid, job["signal"])
        _, status = os.waitpid(pid, 0)
        seconds = time.perf_counter() - began
        return {"code": os.waitstatus_to_exitcode(status), "seconds": seconds, "operations": COUNT.unpack(count)[0]}


def _ended(pid: int, until: float) -> bool:
    """Whether the process ends before that moment; it stays to be waited for."""
    while time.perf_counter() < until:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return True
        time.sleep(1e-4)
    return False


def become(job: dict[str, Any], count: mmap.mmap) -> None:
    """Turn this fork into the command, and leave with its exit code."""
    sys.argv = ["neuromf", *job["words"]]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start what runs behind with SIGINT ignored
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    done, watched = 0, str(Path(job["watch"]).resolve())

    def listen(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal done
        if event in OPERATIONS and any(_path(word).startswith(watched) for word in arguments):
            done += 1
            COUNT.pack_into(count, 0, done)
            if done == job.get("at_operation"):
                os.kill(os.getpid(), job["signal"])

    sys.addaudithook(listen)
    code: Any = 0
    try:
        runpy.run_module("neuromf_cli", run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # taking down an interpreter that holds torch lasts longer than the training


def _path(argument: Any) -> str:
    """What an argument of an audited call names; a folder's open descriptor counts, since `rmtree` works by those."""
    if isinstance(argument, int):
        try:
            return str(Path(f"/proc/self/fd/{argument}").readlink())
        except OSError:
            return ""
    return os.path.realpath(os.fsdecode(argument)) if isinstance(argument, str | bytes | os.PathLike) else ""


if __name__ == "__main__":
    serve()
