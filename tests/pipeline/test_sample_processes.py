"""`neuromf sample` killed and started again, or as two processes, leaves what one undisturbed process leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SERVER = Path(__file__).with_name("interruptible.py")
ALONE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def words(run: Path, out: Path, *more: str) -> list[str]:
    how = ["--n", "6", "--batch-size", "2", "--decode", "--keep-latents", "--device", "cpu", "--quiet"]
    return ["sample", str(run), "--out", str(out), *how, *more]


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, those of killed writers too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Server:
    """Runs commands in forks (see `interruptible`)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, str(SERVER)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | ALONE, cwd=folder,
        )  # fmt: skip
        assert self._answer() == {"threads": 1}

    def run(self, words: list[str], watch: Path, **interruption: Any) -> dict[str, Any]:
        assert self.process.stdin
        log = self.folder / "log.txt"
        self.process.stdin.write(
            json.dumps({"words": words, "log": str(log), "watch": str(watch), **interruption}) + "\n"
        )
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.process.communicate(timeout=10)


class Reference:
    """What one undisturbed process leaves, and in how many file operations."""

    def __init__(self, server: Server, run: Path, folder: Path) -> None:
        outcome = server.run(words(run, folder), folder)
        assert outcome["code"] in (0, 4), (server.folder / "log.txt").read_text()
        self.code, self.operations, self.files = outcome["code"], outcome["operations"], files(folder)


@pytest.fixture(scope="module")
def reference(server: Server, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(server, run, tmp_path_factory.mktemp("reference") / "g")


def test_a_kill_at_any_moment_changes_nothing(server: Server, reference: Reference, run: Path, tmp_path: Path) -> None:
    for part in (0.2, 0.6, 0.9):
        folder = tmp_path / str(part)
        at = {"signal": signal.SIGKILL, "at_operation": round(part * reference.operations)}
        assert server.run(words(run, folder), folder, **at)["code"] == -signal.SIGKILL
        assert files(folder) != reference.files
        assert server.run(words(run, folder), folder)["code"] == reference.code
        assert files(folder) == reference.files


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_two_processes_at_a_time_leave_what_one_leaves(
    reference: Reference, run: Path, tmp_path: Path, launcher: str
) -> None:
    folder, command = tmp_path / "g", ["-m", "--", "neuromf_cli", *words(run, tmp_path / "g", "--json")]
    if launcher == "torchrun":
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        started = [subprocess.Popen([sys.executable, *torchrun, *command], stdout=subprocess.PIPE, text=True)]
    else:  # SLURM itself is not here: its variables are
        slurm = {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost"}
        started = [
            subprocess.Popen(
                [sys.executable, "-m", *command[2:]], stdout=subprocess.PIPE, text=True,
                env=os.environ | ALONE | slurm | {"SLURM_PROCID": str(k), "SLURM_LOCALID": str(k)},
            )
            for k in range(2)
        ]  # fmt: skip
    said = [process.communicate(timeout=200)[0] for process in started]
    codes = [process.returncode for process in started]
    assert codes == ([reference.code, 0] if launcher == "srun" else [min(reference.code, 1)])
    report = json.loads("".join(said))
    assert (report["n"], report["made"]) == (6, 4)
    assert files(folder) == reference.files
