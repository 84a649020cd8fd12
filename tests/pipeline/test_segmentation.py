"""A network on a scan: labels land on the scan's voxels, and volumes are measured."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from neuromf.data.volumes import Volume, load_volume
from neuromf.models.meshnet import LoadedMeshNet, MeshNet, MeshNetLayout, load_meshnet
from neuromf.pipeline.segmentation import largest_part, segment
from neuromf.weights import WeightsFile, find


@pytest.fixture
def threshold() -> LoadedMeshNet:
    """A network whose class 1 is intensity above one half."""
    network = MeshNet(MeshNetLayout(("background", "bright"), 1, (1,), "relu"))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network.model[0].weight[0, 0, 1, 1, 1] = 1.0
        network.model[2].weight[1] = 1.0
        network.model[2].bias[1] = -0.5
    weights = WeightsFile("mindgrab", Path("model.pth"), "0" * 64, find("mindgrab").licence, "published")
    return LoadedMeshNet(network.eval(), weights)


def ball(spacing_mm: float, n: int = 24, apart: bool = False) -> Volume:
    """Bright to a radius of 16 mm, dim to 22 mm; with `apart` a bright corner that does not touch."""
    affine = np.diag([spacing_mm] * 3 + [1.0])
    affine[:3, 3] = (5, -40, 11)
    grid = (np.stack(np.meshgrid(*[np.arange(n) - (n - 1) / 2] * 3, indexing="ij"))) * spacing_mm
    radius = np.sqrt((grid**2).sum(0))
    array = np.where(radius < 16, 100, np.where(radius < 22, 30, 0)).astype(np.float32)
    if apart:
        array[:2, :2, :2] = 100
    return Volume(array, affine, {})


@pytest.mark.parametrize("spacing_mm", [1.0, 2.0])
def test_labels_lie_on_the_scan_and_volumes_are_in_millilitres(threshold: LoadedMeshNet, spacing_mm: float) -> None:
    volume = ball(spacing_mm, n=48 if spacing_mm == 1 else 26)
    found = segment(volume, threshold)
    bright = volume.array > 50
    dice = 2 * ((found.labels == 1) & bright).sum() / ((found.labels == 1).sum() + bright.sum())
    assert dice > (0.999 if spacing_mm == 1 else 0.95)
    assert found.volumes_ml.keys() == {"bright"}
    assert found.volumes_ml["bright"] == pytest.approx(4 / 3 * np.pi * 1.6**3, rel=0.03 if spacing_mm == 1 else 0.1)


def test_what_does_not_touch_the_largest_part_goes(threshold: LoadedMeshNet) -> None:
    volume = ball(2.0, apart=True)
    labels = segment(volume, threshold).labels
    assert labels[12, 12, 12] == 1
    assert labels[:3, :3, :3].max() == 0


def test_parts_that_touch_at_a_corner_are_one_and_labels_are_kept() -> None:
    labels = np.zeros((6, 6, 6), dtype=np.uint8)
    labels[1, 1, 1], labels[2, 2, 2], labels[5, 5, 5] = 3, 2, 1
    assert largest_part(labels).nonzero()[0].tolist() == [1, 2]
    assert largest_part(labels)[2, 2, 2] == 2
    assert not largest_part(np.zeros((3, 3, 3), dtype=np.uint8)).any()


# Of adults (Potvin et al. 2016 and the 20 maps of SynthSeg), in ml; the widest of the two ranges.
ADULTS = {
    ("thalamus",): (11.4, 19.6),
    ("caudate",): (5.0, 9.5),
    ("putamen",): (7.0, 13.0),
    ("pallidum",): (3.0, 4.5),
    ("hippocampus",): (4.0, 10.2),
    ("amygdala",): (2.8, 4.5),
    ("brain stem",): (18, 26),
    ("lateral ventricle", "inferior lateral ventricle"): (8, 91),
    ("cerebellar white matter", "cerebellar cortex"): (115, 165),
}


@pytest.mark.slow
@pytest.mark.gate("P5-T4")
@pytest.mark.parametrize("head", ["t1_crop", "chris_t1"])
def test_whole_heads_have_the_volumes_that_others_measured_and_that_adults_have(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch, head: str
) -> None:
    monkeypatch.setenv("NEUROMF_WEIGHTS", str(shared_data / "weights"))
    found = segment(load_volume(shared_data / f"wholebrain/{head}.nii.gz"), load_meshnet("meshnet-18")).volumes_ml
    with (shared_data / "weights/reference/expected_volumes_ml.csv").open() as handle:
        rows = [row for row in csv.DictReader(handle) if row["class"]]
    expected = {row["name"]: float(row[f"{head} 30ch"]) for row in rows}
    for (name, value), theirs in zip(found.items(), expected.values(), strict=True):
        assert value == pytest.approx(theirs, rel=0.02, abs=0.1), name
    for names, (low, high) in ADULTS.items():
        assert low <= sum(found[name] for name in names) <= high, names
