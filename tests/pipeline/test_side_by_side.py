from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from neuromf import config as settings
from neuromf.errors import Interrupted, UserError
from neuromf.pipeline import side_by_side as module
from neuromf.pipeline.recorder import Silent
from neuromf.pipeline.side_by_side import Job, Relay, _Process, side_by_side
from neuromf.pipeline.toy_task import Task, train_task
from neuromf.training import checkpoint

TINY = ["network.width=16", "network.depth=2", "training.batch_size=16", "intervals.checkpoint_updates=100"]


class Heard(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines += text.splitlines()


def task(out: Path, seed: int, *changes: str) -> Task:
    config = settings.load("toy-torus", [*TINY, f"training.seed={seed}", *changes])
    return Task(config, out / f"x-seed{seed}", 8, "cpu")


def jobs(tasks: list[Task]) -> list[Job]:
    return [Job(one.folder.name, partial(train_task, one)) for one in tasks]


def relay(stopped: bool = False) -> Relay:
    stop = threading.Event()
    if stopped:
        stop.set()
    return Relay("x-seed0", _Process(queue.Queue(), stop, os.getppid()))


def sent(one: Relay) -> list[str]:
    return list(one.process.lines.queue)


def record(update: int) -> dict[str, float]:
    return {"update": update, "updates": 9, "raw_loss": 1.23456, "eta_s": 61.4}


def stop_once(happened: Callable[[], bool]) -> None:
    """Send this process SIGTERM as soon as something has happened."""

    def wait() -> None:
        while not happened():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def saved(one: Task) -> int:
    """The update of the newest checkpoint, 0 without any."""
    newest, _ = checkpoint.newest(one.folder)
    return 0 if newest is None else checkpoint.load(newest).update


def test_more_runs_than_processes_are_all_trained_and_speak_under_their_names(tmp_path: Path) -> None:
    tasks, heard = [task(tmp_path, seed, "training.updates=2") for seed in (0, 1, 2)], Heard()
    side_by_side(jobs(tasks), 2, heard)
    assert all((one.folder / "result.json").exists() for one in tasks)
    last = sorted(line.split(", raw loss")[0] for line in heard.lines if ": update 2/2" in line)
    assert last == [f"x-seed{seed}: update 2/2" for seed in (0, 1, 2)]


@pytest.mark.slow  # new processes import everything again, twice
def test_a_signal_saves_every_run_and_the_same_call_goes_on(tmp_path: Path) -> None:
    tasks = [task(tmp_path, seed, "training.updates=1000000") for seed in (0, 1)]
    stop_once(lambda: all(any(one.folder.glob("checkpoints/*")) for one in tasks))
    with pytest.raises(Interrupted, match="the run is saved"):
        side_by_side(jobs(tasks), 2, Silent())
    first, heard = [saved(one) for one in tasks], Heard()

    stop_once(lambda: sum("resumed after update" in line for line in heard.lines) == 2)
    with pytest.raises(Interrupted):
        side_by_side(jobs(tasks), 2, heard)
    resumed = sorted(line for line in heard.lines if "resumed" in line)
    assert [line.split(" of ")[0].replace(",", "") for line in resumed] == [
        f"x-seed{seed}: resumed after update {update}" for seed, update in enumerate(first)
    ]
    assert all(saved(one) > update for one, update in zip(tasks, first, strict=True))


@pytest.mark.slow
def test_the_failure_of_one_run_stops_the_others_and_is_raised_with_its_hint(tmp_path: Path) -> None:
    short = task(tmp_path, 0, "training.updates=2")
    train_task(short, Silent())
    tasks = [task(tmp_path, 1, "training.updates=1000000"), task(tmp_path, 0, "training.updates=2", "training.lr=0.5")]
    with pytest.raises(UserError, match=r"training\.lr") as caught:
        side_by_side(jobs(tasks), 2, Silent())
    assert not isinstance(caught.value, Interrupted)
    assert caught.value.hint


def test_lines_carry_the_name_and_warnings_stay_warnings() -> None:
    one = relay()
    one.message("warning: loss is high\nresumed")
    assert sent(one) == ["warning: x-seed0: loss is high", "x-seed0: resumed"]


def test_updates_are_shown_by_the_clock_and_the_last_always(monkeypatch: pytest.MonkeyPatch) -> None:
    one = relay()
    one.step(record(1))
    monkeypatch.setattr(module, "LINE_EVERY_S", 0.0)
    one.step(record(2))
    monkeypatch.setattr(module, "LINE_EVERY_S", 1e9)
    one.step(record(3))
    one.step(record(9))
    assert sent(one) == ["x-seed0: update 2/9, raw loss 1.235, 61 s left", "x-seed0: update 9/9, raw loss 1.235"]


def test_a_stopped_run_gets_one_signal_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    signals: list[int] = []
    monkeypatch.setattr(signal, "raise_signal", signals.append)
    one = relay(stopped=True)
    one.step(record(1))
    one.step(record(2))
    assert signals == [signal.SIGTERM]


def test_a_run_whose_parent_is_gone_is_unwanted() -> None:
    one = relay()
    assert not one.unwanted()
    assert Relay("x", one.process._replace(parent=-1)).unwanted()
