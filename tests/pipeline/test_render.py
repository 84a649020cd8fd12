"""A folder of synthetic scans: reproducible, resumable, with the source of each."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from neuromf.data.volumes import load_volume, spacing_of
from neuromf.errors import UserError
from neuromf.pipeline.render import Recipe, render

SMALL = Recipe(size=(16, 20, 16), spacing_mm=10.0)


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "renderings.csv").open(newline="") as handle:
        return list(csv.DictReader(handle))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.nii.gz"))}


def test_an_invented_head_has_the_grid_asked_for(tmp_path: Path) -> None:
    report = render([], tmp_path / "out", n=1, recipe=SMALL)
    volume = load_volume(tmp_path / "out" / "phantom_0001.nii.gz")
    assert report.to_dict()["rendered"] == 1
    assert volume.array.shape == (16, 20, 16)
    assert spacing_of(volume.affine) == pytest.approx((10.0, 10.0, 10.0))
    assert 0 <= volume.array.min() < volume.array.max() <= 1000
    assert table(tmp_path / "out") == [{"file": "phantom_0001.nii.gz", "source": "phantom_seed_0", "seed": "0"}]


def test_a_stopped_folder_continues_to_the_bytes_of_an_uninterrupted_one(
    tmp_path: Path, small_label_maps: Path
) -> None:
    render([small_label_maps], tmp_path / "whole", n=5, recipe=SMALL)
    render([small_label_maps], tmp_path / "parts", n=2, recipe=SMALL)
    (tmp_path / "parts" / "rendering_0001.nii.gz").unlink()
    report = render([small_label_maps], tmp_path / "parts", n=5, recipe=SMALL)
    assert (report.rendered, report.kept) == (4, 1)
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
    assert table(tmp_path / "parts") == table(tmp_path / "whole")


def test_label_maps_take_turns_and_the_table_names_them(tmp_path: Path, small_label_maps: Path) -> None:
    render([small_label_maps], tmp_path / "out", n=3, recipe=SMALL)
    assert [row["source"] for row in table(tmp_path / "out")] == ["anna", "bela", "anna"]
    assert [row["seed"] for row in table(tmp_path / "out")] == ["0", "1", "2"]


def test_a_smaller_call_keeps_the_rows_of_what_is_there(tmp_path: Path, small_label_maps: Path) -> None:
    render([small_label_maps], tmp_path / "out", n=3, recipe=SMALL)
    render([small_label_maps], tmp_path / "out", n=1, recipe=SMALL)
    assert {row["file"] for row in table(tmp_path / "out")} == set(content(tmp_path / "out"))


def test_labels_lie_on_the_grid_of_their_volume(tmp_path: Path, small_label_maps: Path) -> None:
    render([small_label_maps], tmp_path / "out", n=1, recipe=SMALL, labels=True)
    volume = load_volume(tmp_path / "out" / "rendering_0001.nii.gz")
    labels = load_volume(tmp_path / "out" / "labels" / "rendering_0001.nii.gz")
    assert np.array_equal(volume.affine, labels.affine)
    assert set(np.unique(labels.array)) <= {0, 2, 3, 41, 42}


@pytest.mark.parametrize(
    "other", [Recipe(size=(16, 20, 16), spacing_mm=9.0), Recipe(size=(16, 20, 16), spacing_mm=10.0, seed=1)]
)
def test_a_folder_of_other_settings_is_left_alone(other: Recipe, tmp_path: Path, small_label_maps: Path) -> None:
    render([small_label_maps], tmp_path / "out", n=1, recipe=SMALL)
    before = content(tmp_path / "out")
    with pytest.raises(UserError, match="other settings"):
        render([small_label_maps], tmp_path / "out", n=2, recipe=other)
    with pytest.raises(UserError, match="other settings or label maps"):
        render([], tmp_path / "out", n=2, recipe=SMALL)
    assert content(tmp_path / "out") == before


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        render([], tmp_path, n=1, recipe=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_real_label_maps_render(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "synthseg_labels" / "training_seg_01.nii.gz"
    render([source], tmp_path / "out", n=1, recipe=Recipe(size=(32, 32, 32), spacing_mm=6.0, stripped=True))
    array = load_volume(tmp_path / "out" / "rendering_0001.nii.gz").array
    assert 0.1 < (array > 0).mean() < 0.6
