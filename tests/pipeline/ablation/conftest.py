"""A stand-in for `neuromf` that does each stage at once, and writes the files by which a stage is known to be done."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "stand_in.py"
PLAN = """
preset: demo
phantoms: {heads: 12, size: 16, spacing_mm: 12.0}
sample: {n: 4}
metric: frechet_builtin
experiments:
  prediction:
    grid: {objective.prediction: [x, u]}
    seeds: [0, 1]
  lp:
    grid: {objective.lp: [1.5, 2.0, 3.0]}
    seeds: [0, 1]
  nfe:
    nfe: [1, 10]
"""


@pytest.fixture
def stand_in() -> tuple[str, ...]:
    """What to give as `command` instead of `neuromf` itself."""
    return sys.executable, "-S", str(SCRIPT)


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The verbs and settings that the stand-in was called with, one line each."""
    file = tmp_path / "calls.txt"
    monkeypatch.setenv("STAND_IN_CALLS", str(file))
    return lambda: file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def plan_file(tmp_path: Path) -> Callable[..., Path]:
    """`plan_file(text, name)` writes a plan; by default ten cells of eight runs."""

    def write(text: str = PLAN, name: str = "small.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write
