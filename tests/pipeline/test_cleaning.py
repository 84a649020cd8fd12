"""Cleaning: masks are kept and used again only for the same scan and method, and what was done is recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuromf.data.bias_field import BiasCorrection
from neuromf.data.preprocessing import head_mask
from neuromf.data.volumes import Volume, load_volume
from neuromf.errors import ScanError
from neuromf.pipeline import cleaning as module
from neuromf.pipeline.cleaning import Cleaning


class Counting:
    """Calls voxels above a level brain, and counts how often it was asked."""

    def __init__(self, level: float = 50) -> None:
        self.level, self.calls = level, 0

    @property
    def identity(self) -> dict[str, Any]:
        return {"method": "level", "level": self.level}

    def mask(self, volume: Volume) -> np.ndarray:
        self.calls += 1
        return volume.array > self.level


@pytest.fixture
def scan() -> Volume:
    array = np.zeros((10, 12, 14), dtype=np.float32)
    array[2:8, 2:10, 2:12] = 30
    array[4:7, 4:8, 4:9] = 100
    return Volume(array, np.diag([10.0, 10.0, 10.0, 1.0]), {})


def test_by_default_a_scan_passes_as_it_is(scan: Volume, tmp_path: Path) -> None:
    cleaning = Cleaning()
    volume, record = cleaning(scan, tmp_path / "mask.nii.gz", "a")
    assert volume is scan
    assert (record, cleaning.identity, list(tmp_path.iterdir())) == ({}, None, [])


def test_a_stripped_scan_says_how_and_how_large_the_brain_is(scan: Volume, tmp_path: Path) -> None:
    volume, record = Cleaning(Counting())(scan, tmp_path / "masks/anna.nii.gz", "a")
    assert record == {"skull_strip": {"method": "level", "level": 50, "brain_ml": 60.0}}
    assert np.count_nonzero(volume.array) == 60
    mask = load_volume(tmp_path / "masks/anna.nii.gz")
    np.testing.assert_array_equal(mask.array, scan.array > 50)
    np.testing.assert_array_equal(mask.affine, scan.affine)


def test_a_mask_is_used_again_for_the_same_scan_and_method_only(scan: Volume, tmp_path: Path) -> None:
    file, stripper = tmp_path / "anna.nii.gz", Counting()
    first = Cleaning(stripper)(scan, file, "a")
    again = Cleaning(stripper)(scan, file, "a")
    assert stripper.calls == 1
    np.testing.assert_array_equal(first.volume.array, again.volume.array)
    assert first.record == again.record
    Cleaning(stripper)(scan, file, "b")
    assert stripper.calls == 2
    other = Counting(level=20)
    assert Cleaning(other)(scan, file, "b").record["skull_strip"]["brain_ml"] == 480
    assert other.calls == 1


@pytest.mark.parametrize("damage", [b"", b"damaged", None])
def test_a_damaged_mask_is_made_again(scan: Volume, tmp_path: Path, damage: bytes | None) -> None:
    file, stripper = tmp_path / "anna.nii.gz", Counting()
    Cleaning(stripper)(scan, file, "a")
    file.write_bytes(file.read_bytes()[:-60] if damage is None else damage)
    volume, _ = Cleaning(stripper)(scan, file, "a")
    assert stripper.calls == 2
    assert np.count_nonzero(volume.array) == 60


def test_a_scan_without_a_brain_is_refused_and_no_mask_is_left(scan: Volume, tmp_path: Path) -> None:
    with pytest.raises(ScanError, match="no brain"):
        Cleaning(Counting(level=1000))(scan, tmp_path / "anna.nii.gz", "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stripper", [Counting(), None])
def test_n4_looks_at_the_brain_where_one_was_found_and_at_the_head_else(
    scan: Volume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stripper: Counting | None
) -> None:
    head = int(head_mask(scan.array).sum())
    expected = (60, 60) if stripper else (head, 480)
    assert head > 300
    seen = []

    def correct(volume: Volume, mask: np.ndarray, settings: BiasCorrection) -> tuple[Volume, dict[str, Any]]:
        seen.append((int(mask.sum()), np.count_nonzero(volume.array), settings))
        return volume, {"method": "n4"}

    monkeypatch.setattr(module, "correct_bias", correct)
    settings = BiasCorrection(working_mm=8)
    _, record = Cleaning(stripper, settings)(scan, tmp_path / "anna.nii.gz", "a")
    assert seen == [(*expected, settings)]
    assert record["bias_field"] == {"method": "n4"}
