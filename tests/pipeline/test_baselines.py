from __future__ import annotations

from pathlib import Path

import pytest

from neuromf.errors import UserError
from neuromf.files import write_json
from neuromf.pipeline.baselines import Model, model_of, read_baselines

ENTRY = "name: MAISI-v2\nnfe: 30\nseconds: 12.5\ncitation: Guo 2025\n"


def test_volumes_are_of_the_model_that_the_file_beside_them_names(tmp_path: Path) -> None:
    (tmp_path / "peer/volumes").mkdir(parents=True)
    (tmp_path / "peer/baseline.yaml").write_text(ENTRY)
    assert model_of(tmp_path / "peer/volumes") == Model("MAISI-v2", 30, 12.5, "Guo 2025")
    assert model_of(tmp_path / "peer") == Model("MAISI-v2", 30, 12.5, "Guo 2025")


def test_our_own_volumes_are_of_their_run_with_its_evaluations(tmp_path: Path) -> None:
    volumes = tmp_path / "runs/small/generated/volumes"
    volumes.mkdir(parents=True)
    write_json(volumes.parent / "manifest.json", {"nfe": 2})
    assert model_of(volumes) == Model("small", nfe=2)
    (tmp_path / "other/volumes").mkdir(parents=True)
    assert model_of(tmp_path / "other") == model_of(tmp_path / "other/volumes") == Model("other")


def test_cited_numbers_are_read_one_or_several_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "baseline.yaml"
    path.write_text(f"{ENTRY}metrics: {{fid_radimagenet: 1.25}}\n")
    assert read_baselines(path)[0].metrics == {"fid_radimagenet": 1.25}
    path.write_text("baselines:\n- {name: a, citation: x}\n- {name: b, nfe: 1, metrics: {kid_inception: 2}}\n")
    assert [entry.model for entry in read_baselines(path)] == [Model("a", citation="x"), Model("b", 1)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no model"),
        ("[1, 2]", "names no model"),
        ("{name: a", "not readable YAML"),
        ("nfe: 3", "without a name"),
        ("name: a\nnef: 3", "unknown nef"),
        ("name: a\nnfe: 0", "nfe 0 is no number"),
        ("name: a\nnfe: 2.5", "nfe 2.5 is no number"),
        ("name: a\nseconds: fast", "seconds 'fast' is no number"),
        ("name: a\nmetrics: {fid: .nan}", "fid 'nan' is no number"),
        ("name: a\nmetrics: [1]", "names with numbers"),
        ("name: a\ncitation: 2025", "a citation is text"),
    ],
)
def test_what_is_no_baseline_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "baseline.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        read_baselines(path)


def test_volumes_of_two_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "baseline.yaml").write_text("baselines: [{name: a}, {name: b}]\n")
    with pytest.raises(UserError, match="volumes are made by one"):
        model_of(tmp_path)
