"""`neuromf encode` killed at any moment and started again makes the folder that an undisturbed one makes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pytest

from neuromf.files import read_json

SERVER = Path(__file__).with_name("interruptible.py")
SETTINGS = ["--size", "8", "--autoencoder", "haar", "--device", "cpu", "--quiet", "--seed", "3"]
COPIES = ["--copies", "1"]


class Server:
    """Runs `neuromf encode` in forks of `interruptible`, interrupted where asked."""

    def __init__(self, log: Path) -> None:
        self.log = log
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **threads},
            cwd=log.parent,
        )
        assert self._answer() == {"threads": 1}, "a process with threads must not fork"

    def run(self, scans: Path, out: Path, *words: str, **interruption: Any) -> dict[str, Any]:
        assert self.process.stdin
        command = ["encode", str(scans), "--out", str(out), *SETTINGS, *words]
        self.log.unlink(missing_ok=True)
        job = {"words": command, "log": str(self.log), "watch": str(out), **interruption}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("log") / "log.txt")
    yield server
    server.process.communicate(timeout=10)


def make_scans(folder: Path, n: int) -> Path:
    """Tiny scans, and one that is none."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for i in range(n):
        array = draw.integers(0, 1000, (8, 8, 8)).astype(np.int16)
        nib.save(nib.Nifti1Image(array, np.diag([1, 1, 1, 1])), folder / f"s{i:05}.nii")
    (folder / "bad.nii").write_bytes(b"no")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the report, which tells how long things took."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "encode_report.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


class Finished(NamedTuple):
    """A latent that was written: which file, and when."""

    inode: int
    time_ns: int


def finished(folder: Path) -> dict[Path, Finished]:
    return {p: Finished(p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.rglob("*.pt") if p.name[0] != "."}


def kill_until_done(server: Server, scans: Path, root: Path, kills: int, *words: str) -> None:
    """Kill `kills` times, at a moment or at a file operation, each time followed by the same command."""
    undisturbed = server.run(scans, root / "straight", *words)
    assert undisturbed["code"] == 4, server.log.read_text()
    draw, killed, out = random.Random(kills), 0, root / "killed"
    there: dict[Path, Finished] = {}
    total = len(finished(root / "straight"))
    for number in range(kills):
        # Later and later: what is done by then is gone through in a sixth of the operations, and of the time.
        new = max(0.0, (number + draw.random()) / kills - len(there) / total)
        share = new + len(there) / total / 6
        at = (
            {"after_s": undisturbed["seconds"] * share}
            if number % 2
            else {"at_operation": 1 + int(undisturbed["operations"] * share)}
        )
        killed += server.run(scans, out, *words, signal=signal.SIGKILL, **at)["code"] == -signal.SIGKILL
        after = finished(out) if out.is_dir() else {}
        assert {path: after[path] for path in there} == there, "a finished latent was written again"
        there = after
    assert killed >= kills / 2
    assert server.run(scans, out, *words)["code"] == 4, server.log.read_text()
    assert {path: finished(out)[path] for path in there} == there
    assert contents(out) == contents(root / "straight")
    reports = [read_json(folder / "encode_report.json") for folder in (out, root / "straight")]
    ours, theirs = ([(s["subject"], s["reason"], s["sha256"], s["notes"]) for s in r["scans"]] for r in reports)
    assert ours == theirs


def test_five_kills_change_nothing(server, tmp_path):
    kill_until_done(server, make_scans(tmp_path / "scans", 20), tmp_path, 5, *COPIES)


def test_a_kill_while_the_folder_is_finished_changes_nothing(server, tmp_path):
    scans = make_scans(tmp_path / "scans", 6)
    operations = server.run(scans, tmp_path / "straight")["operations"]
    for n, before_the_end in enumerate((1, 4, 8)):
        out = tmp_path / f"out{n}"
        at = operations - before_the_end
        assert server.run(scans, out, signal=signal.SIGKILL, at_operation=at)["code"] == -signal.SIGKILL
        assert server.run(scans, out)["code"] == 4, server.log.read_text()
        assert contents(out) == contents(tmp_path / "straight")


def test_ctrl_c_is_told_and_the_same_command_goes_on(server, tmp_path):
    scans = make_scans(tmp_path / "scans", 6)
    operations = server.run(scans, tmp_path / "straight")["operations"]
    stopped = server.run(scans, tmp_path / "out", signal=signal.SIGINT, at_operation=operations // 2)
    assert (stopped["code"], "run the same command again" in server.log.read_text()) == (75, True)
    assert not list((tmp_path / "out").glob(".*"))
    assert server.run(scans, tmp_path / "out")["code"] == 4
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


@pytest.mark.slow  # its processes import the libraries, four times
def test_a_kill_with_processes_that_read_ahead_changes_nothing(server, tmp_path):
    kill_until_done(server, make_scans(tmp_path / "scans", 20), tmp_path, 2, "--workers", "2")


@pytest.mark.long
@pytest.mark.parametrize("n", [1_000, 10_000])
def test_twenty_kills_of_many_scans_change_nothing(server, tmp_path, n):
    kill_until_done(server, make_scans(tmp_path / "scans", n), tmp_path, 20)
