"""`neuromf presets` and the settings words of `neuromf train`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neuromf.config import load, preset_files

Run = Callable[..., Any]


def test_list_names_every_preset_with_its_purpose(neuromf: Run) -> None:
    found = json.loads(neuromf("presets", "list", "--json").stdout)
    assert found.keys() == preset_files().keys()
    assert all(found.values())
    assert all(name in neuromf("presets", "list").stdout for name in found)


def test_show_prints_the_file_and_resolved_prints_every_setting(neuromf: Run, in_tmp: Path) -> None:
    shown = neuromf("presets", "show", "imf-xpred").stdout
    assert shown.strip() == preset_files()["imf-xpred"].read_text(encoding="utf-8").strip()
    (in_tmp / "imf-xpred.yaml").write_text(neuromf("presets", "show", "imf-xpred", "--resolved").stdout)
    assert load("imf-xpred.yaml") == load("imf-xpred")


def test_copy_makes_a_file_that_train_takes_and_never_overwrites(neuromf: Run, in_tmp: Path) -> None:
    assert neuromf("presets", "copy", "imf-xpred", "mine.yaml").exit_code == 0
    assert load("mine.yaml").training == load("imf-xpred").training
    (in_tmp / "mine.yaml").write_text("# edited\n")
    again = neuromf("presets", "copy", "imf-xpred", "mine.yaml")
    assert again.exit_code == 2
    assert "mine.yaml exists" in again.stderr
    assert (in_tmp / "mine.yaml").read_text() == "# edited\n"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["presets", "show", "imf-xperd"], "'imf-xpred'"),
        (["train", "--preset", "imf-xperd"], "'imf-xpred'"),
        (["train", "training.lrr=1"], "'training.lr'"),
        (["train", "imf-xpred"], "section.key=value"),
        (["train", "training.lr=-1"], "greater than 0"),
        (["train", "--config", "absent.yaml"], "absent.yaml"),
    ],
)
def test_a_wrong_name_or_value_exits_2_with_the_way_out(words: list[str], hint: str, neuromf: Run) -> None:
    result = neuromf(*words)
    assert result.exit_code == 2
    assert hint in result.stderr
    assert result.stdout == ""


def test_train_without_latents_names_the_next_command(neuromf: Run) -> None:
    result = neuromf("train", "--preset", "imf-xpred")
    assert result.exit_code == 2
    assert "neuromf encode" in result.stderr
