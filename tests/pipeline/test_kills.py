"""A run that is killed and started again, however often and whenever, ends as one that never was.

Commands run in forks of `interruptible`, which explains why and how.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from neuromf.files import read_json
from neuromf.training import checkpoint
from neuromf.training.telemetry import SUMMARY

SERVER = Path(__file__).with_name("interruptible.py")
UPDATES = 18
# Everything a checkpoint has to carry: own parameters of the objective, both kinds of averages, an unfinished epoch.
SETTINGS = [
    "network.name=mlp", "network.width=16", "network.depth=2", "objective.prediction=u",
    "objective.channel_weights=learned", "ema.decays=[0.9,0.99]", "ema.half_lives_kimg=[0.1]", "ema.select=0.9",
    f"training.updates={UPDATES}", "training.batch_size=4", "training.accumulation=1", "training.warmup_steps=5",
    "training.lr=1e-2", "intervals.validation=1", "intervals.checkpoint_updates=2", "intervals.keep_every=6",
]  # fmt: skip
STOPPING = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
TIMES = {"epoch_time_sec", "seconds"}


class Outcome(NamedTuple):
    """How a command ended: its exit code (negative: the signal that killed it), and what it took."""

    code: int
    seconds: float
    operations: int


class Server:
    """Runs the same training command into any folder, interrupted where asked."""

    def __init__(self, latents: Path, log: Path) -> None:
        self.latents, self.log = latents, log
        self.process = subprocess.Popen(
            [sys.executable, str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=one_thread(),
            cwd=log.parent,  # where a bug leaves its traceback
        )
        assert self._answer() == {"threads": 1}, "a process with threads must not fork"

    def words(self, out: Path) -> list[str]:
        return ["train", "--data", str(self.latents), "--out", str(out), "--device", "cpu", "--quiet", *SETTINGS]

    def run(self, out: Path, **interruption: Any) -> Outcome:
        assert self.process.stdin
        job = {"words": self.words(out), "log": str(self.log), "watch": str(out), **interruption}
        self.log.unlink(missing_ok=True)
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return Outcome(**self._answer())

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate(timeout=10)


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def server(latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(latents, tmp_path_factory.mktemp("log") / "log.txt")
    yield server
    server.close()


class Reference(NamedTuple):
    folder: Path
    outcome: Outcome


@pytest.fixture(scope="module")
def reference(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The run that is never interrupted."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    outcome = server.run(folder)
    assert outcome.code == 0, server.log.read_text()
    return Reference(folder, outcome)


# --- what a run leaves -------------------------------------------------------------------------------------------


def files(run: Path) -> set[str]:
    """Every file and folder but TensorBoard's, which are named after the time they are begun at."""
    found = {path.relative_to(run).as_posix() for path in run.rglob("*")}
    return {path for path in found if not path.startswith("logs/")}


def untimed(value: Any) -> Any:
    """JSON or a checkpoint's state without wall times."""
    if isinstance(value, dict):
        return {key: untimed(item) for key, item in value.items() if key not in TIMES}
    return [untimed(item) for item in value] if isinstance(value, list | tuple) else value


def same(a: Any, b: Any) -> bool:
    """Bit for bit equality of nested containers of tensors."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def assert_ended_alike(run: Path, reference: Path) -> None:
    assert files(run) == files(reference)  # so that no temporary file and no checkpoint too many is left
    for folder in (run / "checkpoints").glob("step_*"):
        assert checkpoint.intact(folder), f"{folder} is half written"
        ours, theirs = checkpoint.load(folder), checkpoint.load(reference / "checkpoints" / folder.name)
        assert ours.update == theirs.update
        assert same(ours.model, theirs.model)
        assert same(ours.averages, theirs.averages)
        assert same(untimed(ours.state), untimed(theirs.state))
    assert checkpoint.newest(run)[0] == checkpoint.folder_of(run, UPDATES)
    (weights, best), (their_weights, their_best) = checkpoint.load_best(run), checkpoint.load_best(reference)
    assert best == their_best
    assert same(weights, their_weights)
    for name in ("result.json", SUMMARY, "data.json"):
        assert untimed(read_json(run / name)) == untimed(read_json(reference / name)), name


# --- kill -9 -----------------------------------------------------------------------------------------------------


def kill_until_done(server: Server, reference: Reference, root: Path, kills: int) -> int:
    """Kill `kills` times, each time followed by the same command; every run that gets to its end is compared.

    Every other kill comes at a moment up to the length of the whole run, the others at a file operation, most of which
    belong to checkpoints.

    Returns:
        How many runs it took.
    """
    draw, killed, runs = random.Random(kills), 0, 0
    while killed < kills:
        folder = root / f"run_{runs}"
        while killed < kills:
            at_once = (
                {"after_s": draw.uniform(0, reference.outcome.seconds)}
                if killed % 2
                else {"at_operation": draw.randint(1, reference.outcome.operations)}
            )
            outcome = server.run(folder, signal=signal.SIGKILL, **at_once)
            if outcome.code != -signal.SIGKILL:
                break
            killed += 1
        else:
            outcome = server.run(folder)
        assert outcome.code == 0, server.log.read_text()
        assert_ended_alike(folder, reference.folder)
        runs += 1
    return runs


def test_ten_kills_at_random_moments_change_nothing(server, reference, tmp_path, record_property):
    record_property("runs", kill_until_done(server, reference, tmp_path, 10))


@pytest.mark.long
def test_a_hundred_kills_at_random_moments_change_nothing(server, reference, tmp_path, record_property):
    record_property("runs", kill_until_done(server, reference, tmp_path, 100))


@pytest.mark.long
def test_a_kill_at_any_file_operation_changes_nothing(server, reference, tmp_path):
    for number in range(1, reference.outcome.operations + 1):
        folder = tmp_path / f"at_{number}"
        assert server.run(folder, signal=signal.SIGKILL, at_operation=number).code == -signal.SIGKILL
        assert server.run(folder).code == 0, f"killed at operation {number}: {server.log.read_text()}"
        assert_ended_alike(folder, reference.folder)


def test_a_process_of_its_own_is_killed_and_continued_alike(server, reference, tmp_path):
    """What the other tests fork, once as a user starts it."""
    folder, command = tmp_path / "run", [sys.executable, "-m", "neuromf_cli"]
    with subprocess.Popen([*command, *server.words(folder)], env=one_thread()) as process:
        while not any(folder.glob("checkpoints/step_*")):
            assert process.poll() is None, "it ended before its first checkpoint"
            time.sleep(0.001)
        process.kill()
    assert server.run(folder).code == 0, server.log.read_text()
    assert_ended_alike(folder, reference.folder)


# --- signals that ask -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", STOPPING, ids=lambda stop: stop.name)
def test_a_signal_lets_the_step_end_saves_and_the_same_command_goes_on(server, reference, tmp_path, stop):
    folder = tmp_path / "run"
    outcome = server.run(folder, signal=stop, at_operation=reference.outcome.operations // 2)
    said = server.log.read_text()
    assert outcome.code == 75, said
    (update,) = re.findall(rf"{stop.name} after update (\d+) of {UPDATES}; the run is saved", said)
    assert checkpoint.newest(folder) == (checkpoint.folder_of(folder, int(update)), [])
    assert server.run(folder).code == 0, server.log.read_text()
    assert_ended_alike(folder, reference.folder)


@pytest.mark.parametrize("stop", STOPPING, ids=lambda stop: stop.name)
def test_a_signal_before_the_first_step_asks_for_the_same_command_too(server, reference, tmp_path, stop):
    folder = tmp_path / "run"
    assert server.run(folder, signal=stop, at_operation=1).code == 75, server.log.read_text()
    assert server.run(folder).code == 0, server.log.read_text()
    assert_ended_alike(folder, reference.folder)
