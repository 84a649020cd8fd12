"""`neuromf ablate` as it is typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
PLAN = "preset: demo\nphantoms: {heads: 12}\ngrid: {objective.lp: [1.5, 2.0]}\nseeds: [0, 1]\n"


def test_a_dry_run_lists_the_cells_and_writes_nothing(neuromf: Run, in_tmp: Path) -> None:
    (in_tmp / "mine.yaml").write_text(PLAN)
    found = json.loads(neuromf("ablate", "mine.yaml", "--dry-run", "--json").stdout)
    assert found["out"] == "ablations/mine"
    assert [row["state"] for row in found["cells"]] == ["to do"] * 4
    assert found["total"]["runs"] == 4
    assert [path.name for path in in_tmp.iterdir()] == ["mine.yaml"]


def test_status_says_how_far_each_cell_is_and_names_what_failed(neuromf: Run, in_tmp: Path) -> None:
    (in_tmp / "mine.yaml").write_text(PLAN)
    before = json.loads(neuromf("ablate", "mine.yaml", "--status", "--json").stdout)
    assert before["counts"] == {"to do": 4}
    run = before["cells"][1]["run"]
    folder = in_tmp / "ablations/mine"
    (folder / "logs").mkdir(parents=True)
    (folder / "plan.yaml").write_text("name: mine\n" + PLAN)
    note = {"stage": f"{run}.train", "reason": "exit code 3", "log": "logs/a.log", "tail": "error: diverged"}
    (folder / f"logs/{run}.train.failed.json").write_text(json.dumps(note))
    after = neuromf("ablate", "mine.yaml", "--status")
    assert after.exit_code == 4
    assert "failed: train" in after.stdout
    assert "exit code 3; see logs/a.log" in after.stderr
    assert "--retry" in after.stderr


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["ablate", "paper-smal"], "did you mean 'paper-small'?"),
        (["ablate", "absent.yaml"], "shipped plans: ablate-lp"),
        (["ablate", "paper-small", "--dry-run", "--status"], "give one of them"),
        (["ablate", "paper-small", "--collect"], "nothing is evaluated"),
        (["ablate", "paper"], "neuromf encode SCANS"),
    ],
)
def test_a_mistake_exits_2_with_the_way_out(words: list[str], hint: str, neuromf: Run) -> None:
    result = neuromf(*words)
    assert result.exit_code == 2
    assert hint in result.stderr


def test_shipped_plans_are_completed_and_their_commands_parse(repository: Path) -> None:
    from neuromf_cli.app import load_command
    from neuromf_cli.commands.ablate import plan_names

    assert set(plan_names("paper")) == {"paper", "paper-small"}
    for path in sorted((repository / "presets/plans").glob("*.yaml")):
        header = [line for line in path.read_text().splitlines() if line.startswith("#")]
        (command,) = [line.removeprefix("# Command: neuromf ablate ") for line in header if "# Command: " in line]
        context = load_command("ablate").make_context("ablate", command.split())
        assert context.params["plan"] == path.stem
