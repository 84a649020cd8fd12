"""Sets of volumes: in memory or in a file, cleaned or not, by one process or several, they are the same."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from neuromf.data import volume_sets
from neuromf.data.volume_sets import Grid, StoredVolumes, read_volume_set
from neuromf.data.volumes import Volume, save_volume
from neuromf.errors import ScanError
from neuromf.pipeline.workers import ahead

GRID = Grid((6, 7, 8), (2.0, 2.0, 2.0))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Four volumes on the grid, unit scale, at different places."""
    paths = []
    for i in range(4):
        affine = np.diag([2.0, 2.0, 2.0, 1.0])
        affine[:3, 3] = i
        array = np.random.default_rng(i).random(GRID.size, dtype=np.float32)
        save_volume(tmp_path / f"v{i}.nii.gz", array, affine)
        paths.append(tmp_path / f"v{i}.nii.gz")
    return paths


def test_volumes_in_a_file_are_those_in_memory(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = read_volume_set(files, GRID, scratch=tmp_path)
    monkeypatch.setattr(volume_sets, "_RAM_LIMIT_BYTES", 0)
    stored = read_volume_set([*files[:2], tmp_path / "absent.nii.gz", *files[2:]], GRID, scratch=tmp_path)
    assert isinstance(stored.array, StoredVolumes)
    assert len(stored.array) == len(stored) == 4
    np.testing.assert_array_equal(np.stack(list(stored.array)), plain.array)
    np.testing.assert_array_equal(np.stack(stored.array[1:3]), plain.array[1:3])
    assert (stored.keys, stored.sha256) == (plain.keys, plain.sha256)
    assert len(stored.refused) == 1
    with pytest.raises(IndexError):
        stored.array[4]


def test_each_volume_keeps_its_place_in_the_world(files: list[Path], tmp_path: Path) -> None:
    found = read_volume_set(files, GRID, scratch=tmp_path)
    assert found.affines[:, 0, 3].tolist() == [0, 1, 2, 3]
    coarse = Grid((3, 4, 4), (4.0, 4.0, 4.0))
    moved = read_volume_set(files, coarse, scratch=tmp_path)
    assert moved.resampled == 4
    np.testing.assert_allclose(np.abs(np.diag(moved.affines[2])[:3]), 4)


def test_a_set_is_known_by_its_volumes_and_not_by_their_names_or_order(files: list[Path], tmp_path: Path) -> None:
    found = read_volume_set(files, GRID, scratch=tmp_path)
    assert read_volume_set(files[::-1], GRID, scratch=tmp_path).sha256 == found.sha256
    assert read_volume_set(files[:3], GRID, scratch=tmp_path).sha256 != found.sha256


def halved(volume: Volume, path: Path) -> Volume:
    """Stands for skull stripping; fails for one scan."""
    if path.name == "v2.nii.gz":
        raise ScanError("no brain in it")
    return volume._replace(array=volume.array / 2)


def test_scans_are_cleaned_before_they_are_scaled_and_failures_are_listed(files: list[Path], tmp_path: Path) -> None:
    plain = read_volume_set(files, GRID, scratch=tmp_path)
    cleaned = read_volume_set(files, GRID, scratch=tmp_path, clean=halved)
    np.testing.assert_allclose(cleaned.array, plain.array[[0, 1, 3]] / 2)
    assert [entry["reason"] for entry in cleaned.refused] == ["no brain in it"]


def test_two_processes_read_what_one_reads(files: list[Path], tmp_path: Path) -> None:
    files = [*files[:2], tmp_path / "absent.nii.gz", *files[2:]]
    one = read_volume_set(files, GRID, scratch=tmp_path)
    two = read_volume_set(files, GRID, scratch=tmp_path, mapping=partial(ahead, workers=2))
    np.testing.assert_array_equal(two.array, one.array)
    assert (two.keys, two.paths, two.refused) == (one.keys, one.paths, one.refused)
