"""Evaluations compared: what was measured alike is tested, what was not is marked, what is cited is said to be."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from neuromf.data.volumes import save_volume
from neuromf.errors import UserError
from neuromf.files import read_json, write_json
from neuromf.pipeline.comparison import Comparison, compare
from neuromf.pipeline.evaluate import evaluate

SIZE = (16, 16, 16)


class _Autoencoder:
    name = "pooling"

    def __init__(self, sha256: str = "ab" * 32) -> None:
        self.sha256 = sha256

    def check_size(self, size) -> None:
        pass

    def encode(self, volume):
        return SimpleNamespace(mean=torch.nn.functional.avg_pool3d(volume, 4))


def _volumes(folder: Path, n: int, seed: int, shift: float = 0.0, spacing: float = 2.0) -> Path:
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*[np.linspace(-1, 1, 16)] * 3, indexing="ij")
    for i in range(n):
        width = rng.uniform(0.4, 0.8, 3)
        blob = np.exp(-sum((x / w) ** 2 for x, w in zip(axes, width, strict=True)))
        array = blob * (1 - shift) + shift + 0.05 * rng.random(SIZE)
        save_volume(folder / f"v{i:03d}.nii.gz", array, np.diag([spacing] * 3 + [1]))
    return folder


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory) -> Path:
    """Two models as good as each other (one a peer's), a bad one, and others that were measured otherwise."""
    root = tmp_path_factory.mktemp("models")
    real = _volumes(root / "real", 20, 0)
    cases = {
        "good": (14, 1, 0.0), "peer": (14, 2, 0.0), "bad": (14, 3, 0.15), "few": (9, 4, 0.0), "hash": (14, 5, 0.0),
        "grid": (14, 6, 0.0),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("neuromf.pipeline.evaluation_report._draw", lambda *_: [])  # most of the time
        for name, (n, seed, shift) in cases.items():
            folder = _volumes(root / name, n, seed, shift, spacing=3.0 if name == "grid" else 2.0)
            if name == "peer":
                (folder / "baseline.yaml").write_text("name: A peer\nnfe: 50\nseconds: 20\ncitation: Peer 2024\n")
            evaluate(folder, real, autoencoder=_Autoencoder("cd" * 32 if name == "hash" else "ab" * 32))
    return root


def _compare(root: Path, out: Path, *names: str, **options) -> Comparison:
    return compare([root / name for name in names], out, **options)


def test_a_bad_model_is_told_from_a_good_one_and_two_good_ones_are_not(evaluations: Path, tmp_path: Path) -> None:
    found = _compare(evaluations, tmp_path, "good", "peer", "bad")
    tests = {(t["metric"], t["first"], t["second"]): t for t in found.tests}
    for metric in ("kid_builtin", "mmd_builtin", "coverage_builtin"):
        worse = tests[metric, "good", "bad"]
        assert (worse["p_holm"] < 0.05, worse["better"]) == (True, "good"), metric
        assert tests[metric, "good", "A peer"]["p_holm"] > 0.05
    assert tests["kid_builtin", "good", "bad"]["test"] == "jackknife z, one real set"
    assert tests["coverage_builtin", "good", "bad"]["test"] == "paired t"
    assert tests["ssim_nearest", "good", "bad"]["test"] == "Welch's t"
    assert all(t["p_holm"] >= t["p"] for t in found.tests)
    assert not any(t["metric"].startswith("frechet") for t in found.tests)


def test_the_table_says_who_made_the_volumes_with_how_many_evaluations(evaluations: Path, tmp_path: Path) -> None:
    found = _compare(evaluations, tmp_path, "good", "peer")
    assert [row["model"] for row in found.rows] == ["good", "A peer"]
    assert (found.rows[1]["NFE"], found.rows[1]["s/volume"], found.rows[1]["citation"]) == (50, 20, "Peer 2024")
    assert found.rows[0]["N"] == 14
    markdown = (tmp_path / "comparison.md").read_text()
    assert "| kid_builtin |" in markdown
    assert "Peer 2024" in markdown
    lines = list(csv.DictReader((tmp_path / "comparison.csv").open()))
    value = read_json(evaluations / "good/evaluation/metrics.json")["metrics"]["kid_builtin"]["value"]
    assert next(float(x["value"]) for x in lines if x["metric"] == "kid_builtin" and x["model"] == "good") == value
    assert json.loads((tmp_path / "comparison.json").read_text()) == found.content


@pytest.mark.parametrize(
    ("other", "metric", "said"),
    [
        ("few", "frechet_builtin", "N (9 / 20 against 14 / 20)"),
        ("hash", "kid_builtin", "weights"),
        ("grid", "kid_builtin", "grid"),
    ],
)
def test_what_was_measured_otherwise_is_marked_and_not_tested(
    evaluations: Path, tmp_path: Path, other: str, metric: str, said: str
) -> None:
    found = _compare(evaluations, tmp_path, "good", other)
    assert found.rows[1][metric].endswith("(a)") or "(b)" in found.rows[1][metric]
    assert said in " ".join(found.content["rows"][1]["marks"][metric])
    assert any(said in note and "does not compare" in note for note in found.notes)
    assert not found.content["rows"][0]["marks"]
    assert not any(t["metric"] == metric for t in found.tests)


def test_a_number_that_does_not_depend_on_n_is_compared_at_another_n(evaluations: Path, tmp_path: Path) -> None:
    found = _compare(evaluations, tmp_path, "good", "few")
    assert "kid_builtin" not in found.content["rows"][1]["marks"]
    assert any(t["metric"] == "kid_builtin" for t in found.tests)


def test_another_real_set_does_not_compare(evaluations: Path, tmp_path: Path) -> None:
    real = _volumes(tmp_path / "real", 20, 77)
    evaluate(evaluations / "peer", real, autoencoder=_Autoencoder(), out=tmp_path / "other")
    found = compare([evaluations / "good", tmp_path / "other"], tmp_path / "out")
    marks = found.content["rows"][1]["marks"]
    assert all("real set" in marks[name] for name in ("kid_builtin", "ssim_nearest", "spectrum_distance"))
    assert not found.tests


def test_cited_numbers_are_marked_and_never_tested(evaluations: Path, tmp_path: Path) -> None:
    cited = tmp_path / "baseline.yaml"
    cited.write_text("name: Old\nnfe: 1000\ncitation: Old 2023\nmetrics: {kid_builtin: 0.5, fid_inception: 31}\n")
    found = compare([evaluations / "good", cited, evaluations / "bad"], tmp_path / "out")
    row = found.rows[1]
    assert row["model"] == "Old (cited)"
    assert row["kid_builtin"].endswith("(cited)")
    assert row["fid_inception"] == "31.00 (cited)"
    assert row["N"] is None
    assert all("Old (cited)" not in (t["first"], t["second"]) for t in found.tests)
    assert any("(cited)" in note for note in found.notes)


def test_two_models_of_one_name_are_told_apart(evaluations: Path, tmp_path: Path) -> None:
    found = _compare(evaluations, tmp_path, "good", "good")
    assert [row["model"] for row in found.rows] == ["good", "good (2)"]
    assert all(t["difference"] == 0 and t["p"] == 1 for t in found.tests)


def test_only_the_metrics_asked_for_are_shown(evaluations: Path, tmp_path: Path) -> None:
    found = _compare(evaluations, tmp_path, "good", "bad", metrics=["frechet_builtin_ratio", "kid_builtin"])
    assert found.content["metrics"] == ["frechet_builtin_ratio", "kid_builtin"]
    assert {t["metric"] for t in found.tests} == {"kid_builtin"}
    with pytest.raises(UserError, match="no row has the metric 'kid_inception'"):
        _compare(evaluations, tmp_path, "good", "bad", metrics=["kid_inception"])


def test_evaluations_of_before_volumes_were_kept_compare_without_tests(evaluations: Path, tmp_path: Path) -> None:
    content = read_json(evaluations / "good/evaluation/metrics.json")
    del content["model"], content["cleaning"]
    for of in content["sets"].values():
        del of["sha256"]
    write_json(tmp_path / "old/metrics.json", content | {"schema_version": 2})
    found = compare([tmp_path / "old", tmp_path / "old/metrics.json"], tmp_path / "out")
    assert found.rows[0]["model"] == "good"
    assert not found.tests
    assert not found.content["rows"][1]["marks"]


@pytest.mark.parametrize("case", ["one", "absent", "empty", "no evaluation", "nothing cited", "no citation"])
def test_what_cannot_be_compared_is_refused(evaluations: Path, tmp_path: Path, case: str) -> None:
    good = evaluations / "good"
    (tmp_path / "empty").mkdir()
    write_json(tmp_path / "x/metrics.json", {"metrics": {}})
    (tmp_path / "a.yaml").write_text("name: a\ncitation: b\n")
    (tmp_path / "b.yaml").write_text("name: a\nmetrics: {fid_inception: 2}\n")
    sources, said = {
        "one": ([good], "1 evaluation gives no comparison"),
        "absent": ([good, tmp_path / "no"], "no .*no"),
        "empty": ([good, tmp_path / "empty"], "holds no evaluation"),
        "no evaluation": ([good, tmp_path / "x"], "no result of `neuromf evaluate`"),
        "nothing cited": ([good, tmp_path / "a.yaml"], "neither volumes that were evaluated nor cited"),
        "no citation": ([good, tmp_path / "b.yaml"], "of unknown origin"),
    }[case]
    with pytest.raises(UserError, match=said):
        compare(sources, tmp_path / "out")
    assert not (tmp_path / "out").exists()
