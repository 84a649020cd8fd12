"""Results: one JSON object that any parser reads, or lines for a person."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import typer

from neuromf_cli import console


class Report(NamedTuple):
    out: Path
    loss: float
    counts: dict[str, int]


REPORT = Report(Path("runs/a"), float("nan"), {"encoded": 3, "refused": 1})


def test_json_is_one_object_with_null_for_nan(capsys: pytest.CaptureFixture[str]) -> None:
    console.result(REPORT, as_json=True)
    assert json.loads(capsys.readouterr().out) == {
        "out": "runs/a",
        "loss": None,
        "counts": {"encoded": 3, "refused": 1},
    }


def test_lines_name_every_value(capsys: pytest.CaptureFixture[str]) -> None:
    console.result(REPORT, as_json=False)
    assert capsys.readouterr().out.splitlines() == [
        "out     runs/a",
        "loss    -",
        "counts",
        "  encoded  3",
        "  refused  1",
    ]


def test_refused_inputs_are_named_and_exit_with_4(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught:
        console.result(REPORT, as_json=True, refused=["a.nii: constant"])
    output = capsys.readouterr()
    assert caught.value.exit_code == 4
    assert json.loads(output.out)
    assert "a.nii: constant" in output.err


def test_a_table_is_aligned_below_its_heading(capsys: pytest.CaptureFixture[str]) -> None:
    console.table([{"name": "a", "value": 1.5}, {"name": "longer", "value": None}])
    assert capsys.readouterr().out.splitlines() == ["name    value", "a       1.5", "longer  -"]
