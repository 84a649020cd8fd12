from __future__ import annotations

import json

import pytest

from neuromf.files import write_json

LISTED = ["--features", "builtin,incepton"]
REPEATED = ["--features", "builtin", "--features", "incepton"]


@pytest.mark.parametrize("words", [LISTED, REPEATED])
def test_features_are_a_list_or_repeated_and_unknown_ones_are_refused(neuromf, in_tmp, words: list[str]) -> None:
    result = neuromf("evaluate", "generated", "real", *words)
    assert result.exit_code == 2
    assert "no features 'incepton'" in result.stderr
    assert "did you mean 'inception'" in result.stderr


def test_a_file_that_is_not_there_is_said_before_volumes_are_read(neuromf, in_tmp) -> None:
    result = neuromf("evaluate", "generated", "real", "--features", "module:own.py")
    assert result.exit_code == 2
    assert "own.py is not a Python file" in result.stderr


def test_one_folder_is_answered_with_what_to_type(neuromf, in_tmp) -> None:
    result = neuromf("evaluate", "generated")
    assert result.exit_code == 2
    assert "one folder given" in result.stderr
    assert "--compare A B" in result.stderr


def test_options_of_morphology_without_it_are_refused(neuromf, in_tmp) -> None:
    result = neuromf("evaluate", "generated", "real", "--morphology-limit", "8")
    assert result.exit_code == 2
    assert "--morphology meshnet-18" in result.stderr


def test_an_unknown_segmentation_is_refused_before_volumes_are_read(neuromf, in_tmp) -> None:
    result = neuromf("evaluate", "generated", "real", "--morphology", "meshnet18")
    assert result.exit_code == 2
    assert "did you mean 'meshnet-18'" in result.stderr


def test_evaluations_are_compared_in_one_table(neuromf, in_tmp) -> None:
    for name, value in (("a", 0.25), ("b", 0.5)):
        write_json(in_tmp / name / "metrics.json", _metrics(name, value))
    (in_tmp / "cited.yaml").write_text("name: c\ncitation: d\nmetrics: {kid_builtin: 1.5}\n")
    result = neuromf("evaluate", "--compare", "a", "b", "cited.yaml")
    assert result.exit_code == 0, result.stderr
    assert "| kid_builtin | 0.2500 | 0.5000 | 1.500 (cited) |" in result.stdout
    assert (in_tmp / "comparison/comparison.md").read_text().strip() == result.stdout.strip()
    wanted = neuromf("evaluate", "--compare", "a", "b", "--json", "--out", "out", "--metric", "kid_builtin")
    assert json.loads(wanted.stdout)["metrics"] == ["kid_builtin"]
    assert neuromf("evaluate", "--compare", "a").exit_code == 2


def _metrics(name: str, value: float) -> dict:
    entry = {"value": value, "low": None, "high": None, "n": {"generated": 3, "real": 3}, "better": "lower"}
    described = {"source": name, "n": 3, "sha256": "0" * 64, "brought_to_grid": 0}
    return {
        "format": "neuromf-metrics",
        "schema_version": 3,
        "model": {"name": name, "nfe": 1, "seconds": None, "citation": None},
        "grid": {"size": [8, 8, 8], "spacing_mm": [1, 1, 1]},
        "preprocessing": None,
        "cleaning": None,
        "sets": {"generated": described, "real": described | {"source": "real"}},
        "metrics": {"kid_builtin": entry},
    }
