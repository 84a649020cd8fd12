"""What preprocessing did comes undone: a scan's own voxels, intensities, axes and affine, from the record alone."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import apply_orientation, inv_ornt_aff
from scipy.spatial.transform import Rotation

from neuromf.data.preprocessing import Prepared, Preprocessing, crop_or_pad, preprocess, resample
from neuromf.data.restoration import Restored, restore, restore_grid, restore_intensity
from neuromf.data.volumes import Volume, load_volume

ORIENTATIONS = [
    np.array(list(zip(axes, signs, strict=True)))
    for axes in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]
SHAPE = (40, 36, 44)


def oblique(spacing: tuple[float, float, float] = (1.0, 1.2, 0.9)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", (12, -17, 9), degrees=True).as_matrix() @ np.diag(spacing)
    affine[:3, 3] = (-31, 12, 5)
    return affine


def blob(centre: tuple[float, ...] = (18, 20, 21), width: float = 6.0) -> np.ndarray:
    offset = np.indices(SHAPE) - np.reshape(centre, (3, 1, 1, 1))
    return (30 + 400 * np.exp(-0.5 * (offset**2).sum(0) / width**2)).astype(np.float32)


def stored(folder: Path, array: np.ndarray, orientation: np.ndarray | None = None) -> Path:
    """A file whose axes run as told, showing `array` in RAS order at `oblique()`."""
    orientation = ORIENTATIONS[0] if orientation is None else orientation
    affine = oblique() @ inv_ornt_aff(orientation, array.shape)
    nib.save(nib.Nifti1Image(apply_orientation(array, orientation), affine), folder / "scan.nii.gz")
    return folder / "scan.nii.gz"


def there_and_back(path: Path, spec: Preprocessing) -> tuple[Prepared, Restored]:
    prepared = preprocess(load_volume(path), spec)
    record = json.loads(json.dumps(prepared.record))  # as it lies in a latent
    return prepared, restore(prepared.array[0], record)


@pytest.mark.parametrize("orientation", ORIENTATIONS, ids=lambda o: "".join(map(str, o.astype(int).ravel())))
def test_a_scan_that_was_only_padded_comes_back_voxel_by_voxel_in_every_orientation(tmp_path, orientation):
    path = stored(tmp_path, blob(), orientation)
    _, back = there_and_back(path, Preprocessing((48, 48, 48), None))
    file = nib.load(path)
    assert np.array_equal(back.affine, file.affine)
    assert back.array.dtype == np.float32
    np.testing.assert_allclose(back.array, file.get_fdata(), atol=2e-7 * 430)


def test_what_the_crop_left_out_is_the_darkest_value(tmp_path):
    path = stored(tmp_path, blob())
    prepared, back = there_and_back(path, Preprocessing((24, 24, 24), None))
    box = tuple(slice(n, n + 24) for n in prepared.record["crop_start"])
    scan = nib.load(path).get_fdata()
    np.testing.assert_allclose(back.array[box], scan[box], atol=1e-4)
    outside = np.ones(SHAPE, dtype=bool)
    outside[box] = False
    assert np.unique(back.array[outside]) == pytest.approx([scan[box].min()])


@pytest.mark.parametrize("spacing", [0.6, 1.0, 1.5, 2.0, (1.0, 2.0, 0.9)])
def test_a_smooth_scan_survives_another_spacing(tmp_path, spacing):
    path = stored(tmp_path, blob(), ORIENTATIONS[29])
    _, back = there_and_back(path, Preprocessing((88, 88, 88), spacing))
    scan = nib.load(path).get_fdata()
    assert back.array.shape == scan.shape
    assert np.abs(back.array - scan).max() < 0.08 * np.ptp(scan)
    where = np.indices(scan.shape).reshape(3, -1)
    middles = [(where * (a - 30).ravel()).sum(1) / (a - 30).sum() for a in (back.array, scan)]
    np.testing.assert_allclose(*middles, atol=0.05)


@pytest.mark.parametrize("shape", [(39, 36, 41), (40, 37, 44)])
@pytest.mark.parametrize("factor", [0.7, 1.5, 2.0])
def test_the_way_back_from_a_spacing_is_exact_for_what_is_linear(shape, factor):
    """On odd and even numbers of voxels: half a voxel of shift would show at once."""
    i, j, k = np.indices(shape)
    ramp = (3.0 * i - 2.0 * j + k).astype(np.float32)
    spacing = (factor, factor, factor)
    volume = Volume(ramp, np.eye(4), {"affine": np.eye(4).tolist()})
    prepared = preprocess(volume, Preprocessing((64, 64, 64), spacing, centre="grid"))
    grid, _ = crop_or_pad(resample(ramp, np.eye(4), spacing)[0], tuple(prepared.record["crop_start"]), (64, 64, 64))
    back = restore_grid(grid, prepared.record).array
    # Smoothing and repeated edges bend the ramp near the border alone; a shift by half a voxel would make 1.5.
    inner = (slice(6, -6),) * 3
    np.testing.assert_allclose(back[inner], ramp[inner], atol=0.1)


def test_labels_stay_labels(tmp_path):
    labels = np.digitize(blob(), (100, 250)).astype(np.uint8)
    record = preprocess(load_volume(stored(tmp_path, blob())), Preprocessing((64, 64, 64), (0.8, 1.2, 0.7))).record
    # A finer grid holds every voxel at least once: nothing is lost.
    scaled, _ = resample(labels.astype(np.float32), oblique(), (0.8, 1.2, 0.7))
    grid, _ = crop_or_pad(np.rint(scaled).astype(np.uint8), tuple(record["crop_start"]), (64, 64, 64))
    back = restore_grid(grid, record, nearest=True).array
    assert back.dtype == np.uint8
    assert set(np.unique(back)) == {0, 1, 2}
    assert (back == labels).mean() > 0.99


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1.7e4])
def test_restore_intensity_inverts(scale):
    array = (scale * blob()).astype(np.float32)
    prepared = preprocess(Volume(array, oblique(), {}), Preprocessing(SHAPE, None))
    restored = restore_intensity(prepared.array[0], prepared.record)
    assert restored.dtype == np.float32
    np.testing.assert_allclose(restored, array, rtol=0, atol=2e-7 * array.max())
