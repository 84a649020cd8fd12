from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from neuromf.data.preprocessing import head_mask
from neuromf.pipeline.volume_check import check_volume


@pytest.mark.parametrize(
    ("volume", "complaint"),
    [
        (np.full((8, 8, 8), np.nan), "not finite"),
        (np.zeros((8, 8, 8)), "empty"),
        (np.linspace(0, 50, 512).reshape(8, 8, 8), "out of range"),
    ],
)
def test_quality_check_names_what_is_wrong(volume: np.ndarray, complaint: str) -> None:
    assert complaint in check_volume(volume.astype(np.float32)).problem


def test_quality_check_passes_a_head(heads: Path) -> None:
    path = sorted(heads.glob("*.nii.gz"))[0]
    found = check_volume((nib.load(path).get_fdata() / 1000).astype(np.float32), voxel_ml=12**3 / 1000)
    assert found.problem == ""
    assert found.finite == 1
    assert 2000 < found.head_ml < 6000


def test_figures_are_of_the_finite_voxels() -> None:
    volume = np.zeros((8, 8, 8), np.float32)
    volume[2:6, 2:6, 2:6] = 1
    volume[0, 0, 0], volume[7, 7, 7] = np.inf, -np.inf
    found = check_volume(volume, voxel_ml=0.5)
    head = int(head_mask(np.where(np.isfinite(volume), volume, 0)).sum())
    assert head >= 32
    assert found[1:] == (510 / 512, 0.0, 1.0, head / 512, head / 2)
    assert "0.39 % of the voxels are not finite" in found.problem
