"""Anatomy in `evaluate`: by a segmentation or by tables, kept, resumed, and never a number of what was not measured."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from neuromf.data.structure_tables import read_structure_table, write_structure_table
from neuromf.data.volumes import Volume, save_volume
from neuromf.errors import UserError
from neuromf.pipeline import evaluation_morphology, evaluation_report
from neuromf.pipeline.evaluate import EvaluateReport, Morphology, evaluate
from neuromf.pipeline.segmenters import METHODS, Anatomy

SIZE = (16, 16, 16)
STRUCTURES = ("cerebral white matter", "cerebral cortex", "thalamus", "caudate", "hippocampus")
# Of STRUCTURES, in FreeSurfer's numbers.
NUMBERS = (2, 42, 10, 50, 17)


class _Autoencoder:
    name, sha256 = "pooling", "ab" * 32

    def check_size(self, size) -> None:
        pass

    def encode(self, volume):
        return SimpleNamespace(mean=torch.nn.functional.avg_pool3d(volume, 4))


class _Bands:
    """Structure k is where the intensity is k / 10; counts what it was asked, and may fail at the n-th head."""

    name, sha256, how, batch, classes = "meshnet-18", "cd" * 32, "bands of intensity", 2, STRUCTURES
    asked, fails_at = 0, 10**9

    def __call__(self, heads: list[Volume]) -> list[Anatomy]:
        found = []
        for head in heads:
            type(self).asked += 1
            if self.asked == self.fails_at:
                raise KeyboardInterrupt
            labels = np.rint(head.array * 10).clip(0, 5).astype(np.uint8)
            voxel_ml = abs(np.linalg.det(head.affine[:3, :3])) / 1000
            counts = np.bincount(labels.ravel(), minlength=6)[1:]
            found.append(Anatomy(dict(zip(STRUCTURES, (counts * voxel_ml).tolist(), strict=True)), labels))
        return found


@pytest.fixture(autouse=True)
def bands(monkeypatch: pytest.MonkeyPatch) -> type[_Bands]:
    monkeypatch.setattr(_Bands, "asked", 0)
    monkeypatch.setattr(_Bands, "fails_at", 10**9)
    monkeypatch.setattr(evaluation_morphology, "load_segmenter", lambda name, device="cpu": _Bands())
    return _Bands


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Drawing takes most of the time of these small evaluations."""
    if "picture" not in request.node.name:
        monkeypatch.setattr(evaluation_report, "_draw", lambda *_: [])


def _labels(seed: int, growth: float = 1.0) -> np.ndarray:
    """Nested shells of STRUCTURES, 1 to 5, around a centre; all of a head are larger or smaller together."""
    rng = np.random.default_rng(seed)
    radius = np.sqrt(sum(((x - 7.5) / 7.5) ** 2 for x in np.meshgrid(*[np.arange(16)] * 3, indexing="ij")))
    edges = np.array([0.35, 0.5, 0.65, 0.8, 0.95]) * rng.normal(1, 0.08) + rng.normal(0, 0.015, 5)
    labels = np.zeros(SIZE, dtype=np.uint8)
    for number, edge in enumerate(edges[::-1] * growth, 1):
        labels[radius < edge] = number
    return labels


def _folder(folder: Path, n: int, first: int, growth: float = 1.0, *, maps: Path | None = None) -> Path:
    affine = np.diag([8.0, 8.0, 8.0, 1.0])
    for i in range(n):
        labels = _labels(first + i, growth)
        unique = labels / 10 + 1e-5 * (first + i)  # two heads of equal shells would share their segmentation
        save_volume(folder / f"h{first + i}.nii.gz", unique.astype(np.float32), affine)
        if maps is not None:
            numbers = np.array((0, *NUMBERS))[labels]
            save_volume(maps / f"h{first + i}.nii.gz", numbers, affine, dtype=np.int16)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("heads")
    return {
        "generated": _folder(root / "generated", 14, 0),
        "real": _folder(root / "real", 18, 100, maps=root / "maps"),
        "grown": _folder(root / "grown", 14, 200, 1.12),
        "maps": root / "maps",
    }


def _evaluate(generated: Path, real: Path, out: Path, by: str = "meshnet-18", **options) -> EvaluateReport:
    wanted = Morphology(by, options.pop("limit", None), options.pop("labels", None))
    return evaluate(generated, real, autoencoder=_Autoencoder(), morphology=wanted, out=out, **options)


@pytest.mark.gate("P5-T5")
def test_anatomy_of_the_same_kind_differs_by_chance_and_grown_heads_differ(folders, tmp_path: Path) -> None:
    same = _evaluate(folders["generated"], folders["real"], tmp_path / "a")
    grown = _evaluate(folders["grown"], folders["real"], tmp_path / "b")
    effects = [report.metrics["morphology_effect"] for report in (same, grown)]
    assert effects[0]["low"] < 2 * effects[0]["expected"]
    assert effects[1]["low"] > effects[0]["value"]
    assert same.metrics["morphology_structures_differing"]["value"] == 0
    assert grown.metrics["morphology_structures_differing"]["value"] > 0
    assert same.metrics["morphology_correlation_r"]["high"] > 0.5
    assert "morphology_correlation_r_real_real" in same.metrics
    for name in ("morphology_effect", "morphology_correlation_r"):
        assert same.metrics[name]["n"] == {"generated": 14, "real": 18}
        assert (same.metrics[name]["segmentation"], same.metrics[name]["weights_sha256"]) == ("meshnet-18", "cd" * 32)


def test_the_table_the_picture_and_the_volumes_are_written(folders, tmp_path: Path) -> None:
    report = _evaluate(folders["generated"], folders["real"], tmp_path)
    text = report.markdown.read_text()
    assert "| hippocampus |" in text
    assert "bands of intensity" in text
    assert (tmp_path / "morphology.png") in report.figures
    table = read_structure_table(tmp_path / "morphology_real.csv")
    assert table.subjects[0] == "h100"
    listed = {row["structure"]: row for row in report.content["details"]["morphology"]}
    assert listed["thalamus"]["real_ml"] == pytest.approx(table.columns(["thalamus"]).mean(), rel=1e-4)


def test_tables_of_volumes_give_the_numbers_of_the_segmentation_they_came_from(folders, tmp_path: Path) -> None:
    measured = _evaluate(folders["generated"], folders["real"], tmp_path / "a")
    tables = f"{tmp_path / 'a/morphology_generated.csv'},{tmp_path / 'a/morphology_real.csv'}"
    read = _evaluate(folders["generated"], folders["real"], tmp_path / "b", by=tables)
    for name in ("morphology_effect", "morphology_correlation_r"):
        assert read.metrics[name]["value"] == pytest.approx(measured.metrics[name]["value"], rel=1e-3)
        assert read.metrics[name]["segmentation"] == "measured elsewhere"
    assert len(read.content["details"]["segmentation"]["sha256"]) == 2


def test_segmentations_are_kept_and_a_stopped_one_goes_on(folders, tmp_path: Path, monkeypatch, bands) -> None:
    monkeypatch.setattr(bands, "fails_at", 8)
    with pytest.raises(KeyboardInterrupt):
        _evaluate(folders["generated"], folders["real"], tmp_path / "a", cache=tmp_path / "cache")
    monkeypatch.setattr(bands, "fails_at", 10**9)
    _evaluate(folders["generated"], folders["real"], tmp_path / "a", cache=tmp_path / "cache")
    assert bands.asked == 8 + 32 - 6  # three batches of two were kept
    _evaluate(folders["grown"], folders["real"], tmp_path / "b", cache=tmp_path / "cache")
    assert bands.asked == 34 + 14
    damaged = next((tmp_path / "cache").glob("meshnet-18-*/*.npz"))
    damaged.write_bytes(damaged.read_bytes()[:-40])
    _evaluate(folders["generated"], folders["real"], tmp_path / "a", cache=tmp_path / "cache")
    assert bands.asked <= 49


def test_a_limit_takes_so_many_of_each_set_and_says_so(folders, tmp_path: Path, bands) -> None:
    report = _evaluate(folders["generated"], folders["real"], tmp_path, limit=5)
    assert bands.asked == 10
    assert report.metrics["morphology_effect"]["n"] == {"generated": 5, "real": 5}


def test_dice_is_measured_where_there_are_label_maps_of_the_same_name(folders, tmp_path: Path) -> None:
    report = _evaluate(folders["generated"], folders["real"], tmp_path, labels=folders["maps"])
    assert report.metrics["dice_real"]["value"] == pytest.approx(1)
    assert report.metrics["dice_real"]["n"] == 18
    assert set(report.content["details"]["dice_real"]) == set(STRUCTURES)
    assert "dice_generated" not in report.metrics


def test_label_maps_on_another_grid_are_brought_to_the_volumes(folders, tmp_path: Path) -> None:
    for path in sorted(folders["maps"].glob("*.nii.gz")):
        seed = int(path.name[1:].split(".")[0])
        fine = np.array((0, *NUMBERS))[_labels(seed)].repeat(2, 0).repeat(2, 1).repeat(2, 2)
        affine = np.diag([4.0, 4.0, 4.0, 1.0])
        affine[:3, 3] = -2  # the middle of a large voxel lies between eight small ones
        save_volume(tmp_path / "maps" / path.name, fine, affine, dtype=np.int16)
    report = _evaluate(folders["generated"], folders["real"], tmp_path / "out", labels=tmp_path / "maps")
    assert report.metrics["dice_real"]["value"] > 0.999


def test_label_maps_of_no_volume_are_said(folders, tmp_path: Path) -> None:
    (tmp_path / "maps").mkdir()
    report = _evaluate(folders["generated"], folders["real"], tmp_path / "out", labels=tmp_path / "maps")
    assert "no volume has a label map of its name" in report.content["not_computed"]["dice"]
    assert "morphology_effect" in report.metrics


def test_volumes_that_show_no_whole_brain_are_said(folders, tmp_path: Path) -> None:
    crops = {}
    for name in ("generated", "real"):
        crops[name] = tmp_path / name
        for path in sorted(folders[name].glob("*.nii.gz")):
            import nibabel as nib

            save_volume(crops[name] / path.name, nib.load(path).get_fdata(), np.diag([1.0, 1.0, 1.0, 1.0]))
    report = _evaluate(crops["generated"], crops["real"], tmp_path / "out")
    assert any("no whole heads" in note for note in report.content["notes"])


def test_two_heads_of_a_side_give_no_number(folders, tmp_path: Path) -> None:
    few = [folders["generated"] / f"h{i}.nii.gz" for i in range(2)]
    report = _evaluate(few, folders["real"], tmp_path)
    assert "at least 3 volumes" in report.content["not_computed"]["morphology"]
    assert not any(name.startswith("morphology") and "real_real" not in name for name in report.metrics)


def test_what_was_not_asked_for_is_said_with_what_to_type(folders, tmp_path: Path) -> None:
    report = evaluate(folders["generated"], folders["real"], autoencoder=_Autoencoder(), out=tmp_path)
    assert "--morphology" in report.content["not_computed"]["morphology"]
    assert all(method in report.content["not_computed"]["morphology"] for method in METHODS)


@pytest.mark.parametrize("case", ["unknown", "absent table", "other structures", "labels without", "no labels"])
def test_what_cannot_be_measured_is_refused_before_anything_is_read(case: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.undo()
    names = {"a.csv": ["thalamus", "csf"], "b.csv": ["thalamus", "caudate"]}
    for file, structures in names.items():
        write_structure_table(tmp_path / file, ["x"], structures, np.full((1, 2), 500.0))
    wanted = {
        "unknown": Morphology("meshnet-81"),
        "absent table": Morphology(f"{tmp_path / 'a.csv'},{tmp_path / 'no.csv'}"),
        "other structures": Morphology(f"{tmp_path / 'a.csv'},{tmp_path / 'b.csv'}"),
        "labels without": Morphology("synthseg", labels=tmp_path),
        "no labels": Morphology("meshnet-18", labels=tmp_path / "absent"),
    }[case]
    said = {
        "unknown": "no segmentation 'meshnet-81'",
        "absent table": "no.csv does not exist",
        "other structures": "in one of the two tables of volumes only: caudate, csf",
        "labels without": "draws no such labels",
        "no labels": "no folder of label maps",
    }[case]
    with pytest.raises(UserError, match=said):
        evaluate(tmp_path / "absent", tmp_path / "absent", autoencoder=_Autoencoder(), morphology=wanted)


def test_a_segmentation_without_its_weights_is_not_computed_and_nothing_else_fails(
    folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("NEUROMF_WEIGHTS", str(tmp_path / "weights"))
    report = _evaluate(folders["generated"], folders["real"], tmp_path / "out")
    assert "not on this machine" in report.content["not_computed"]["morphology"]
    assert "meshnet-18" in report.content["not_computed"]["morphology"]
    assert "frechet_builtin" in report.metrics
