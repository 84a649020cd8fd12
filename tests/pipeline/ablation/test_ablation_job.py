"""A job's own process: how the stage below it ended is what its exit code and the note say, whatever signals came."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest

from neuromf.pipeline.ablation.job import StageJob

ASKED = "import os, signal; os.kill(os.getppid(), signal.SIGUSR1); "


def ends(tmp_path: Path, code: str) -> int:
    """The exit code of a job whose stage is this Python."""
    try:
        StageJob("a.train", (sys.executable, "-S", "-c", code), ("train", "--out", "runs/a"), tmp_path)()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("", 0),
        ("raise SystemExit(4)", 0),  # remarks
        ("raise SystemExit(75)", 75),
        (ASKED + "raise SystemExit(75)", 75),
        (ASKED + "os.kill(os.getpid(), signal.SIGUSR1)", 75),  # it could not take the signal yet
        (ASKED + "raise SystemExit(1)", 75),  # it came in the middle of an import
        (ASKED, 0),  # it finished nevertheless
    ],
)
def test_a_stage_that_did_well_or_was_stopped_leaves_no_note_of_failure(
    code: str, expected: int, tmp_path: Path
) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    assert ends(tmp_path, code) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["a.train.log"]
    assert signal.getsignal(signal.SIGUSR1) is before


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("print('the loss is not finite'); raise SystemExit(3)", "exit code 3"),
        ("import os; print('the loss is not finite', flush=True); os.kill(os.getpid(), 9)", "killed by signal 9"),
    ],
)
def test_a_failure_is_noted_with_the_end_of_the_log_and_forgotten_when_tried_again(
    code: str, reason: str, tmp_path: Path
) -> None:
    assert ends(tmp_path, code) == 1
    note = json.loads((tmp_path / "a.train.failed.json").read_text())
    assert (note["stage"], note["reason"]) == ("a.train", reason)
    assert note["tail"].splitlines() == ["$ neuromf train --out runs/a", "the loss is not finite"]
    assert ends(tmp_path, "") == 0
    assert not (tmp_path / "a.train.failed.json").exists()


def test_a_stage_uses_the_cores_that_the_job_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "7")
    assert ends(tmp_path, "import os; print(os.environ['OMP_NUM_THREADS'])") == 0
    assert (tmp_path / "a.train.log").read_text().splitlines()[-1] == "7"


def test_what_a_job_imports_is_light() -> None:
    import subprocess

    heavy = "import sys, neuromf.pipeline.ablation.job; print({'torch', 'numpy', 'pydantic'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True).stdout == "set()\n"
