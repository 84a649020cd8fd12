"""The conformed grid: landmarks stay in place, and labels come back to the voxels they were made for."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from neuromf.data.conform import Conformed, conform, to_grid_of
from neuromf.data.volumes import Volume


def blobs(shape: tuple[int, int, int], affine: np.ndarray, seed: int = 0) -> Volume:
    """A smooth field above zero, dark at the rim."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    centres = np.random.default_rng(seed).uniform(-0.4, 0.4, (4, 3, 1, 1, 1))
    array = sum(np.exp(-8 * ((grid - c) ** 2).sum(0)) * (i + 1) for i, c in enumerate(centres))
    return Volume(np.asarray(array - np.min(array), dtype=np.float32), affine, {})


def oblique(spacing: tuple[float, float, float]) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", (8, -12, 5), degrees=True).as_matrix() @ np.diag(spacing)
    affine[:3, 3] = (-31, 12, 5)
    return affine


def centre_of_mass(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    where = np.stack(np.meshgrid(*[np.arange(n) for n in array.shape], indexing="ij")).reshape(3, -1)
    mean = (where * array.ravel()).sum(1) / array.sum()
    return affine[:3, :3] @ mean + affine[:3, 3]


@pytest.fixture(scope="module")
def straight() -> tuple[Volume, Conformed]:
    affine = np.eye(4)
    affine[:3, 3] = (-13.5, 4.5, 20.5)
    volume = blobs((28, 30, 26), affine)
    return volume, conform(volume)


@pytest.fixture(scope="module")
def turned() -> tuple[Volume, Conformed]:
    volume = blobs((40, 36, 30), oblique((1.2, 0.9, 2.0)))
    return volume, conform(volume)


def test_the_grid_is_that_of_freesurfer(turned: tuple[Volume, Conformed]) -> None:
    _, result = turned
    assert result.array.shape == (256, 256, 256)
    assert result.array.dtype == np.float32
    assert nib.aff2axcodes(result.affine) == ("L", "I", "A")
    np.testing.assert_array_equal(np.abs(result.affine[:3, :3]).sum(axis=0), 1)
    greys = np.unique(result.array) * 255
    np.testing.assert_allclose(greys, np.rint(greys), atol=1e-4)
    assert (greys[0], greys[-1]) == (0, 255)


def test_a_scan_of_one_millimetre_comes_through_voxel_by_voxel(straight: tuple[Volume, Conformed]) -> None:
    volume, result = straight
    upper = np.percentile(volume.array[volume.array > 0], 99.9)
    greys = np.rint((volume.array / upper * 255).clip(0, 255)) / 255
    # By nibabel, which knows nothing of how it was made.
    back = nib.as_closest_canonical(nib.Nifti1Image(result.array, result.affine))
    start = np.rint(np.linalg.inv(back.affine) @ volume.affine[:, 3])[:3].astype(int)
    box = tuple(slice(s, s + n) for s, n in zip(start, volume.array.shape, strict=True))
    found = np.asarray(back.dataobj)
    assert np.abs(found[box] - greys).max() <= 1 / 255 + 1e-6
    assert found.sum() == pytest.approx(found[box].sum())


def test_landmarks_of_an_oblique_scan_stay_in_place(turned: tuple[Volume, Conformed]) -> None:
    volume, result = turned
    np.testing.assert_allclose(
        centre_of_mass(result.array, result.affine), centre_of_mass(volume.array, volume.affine), atol=0.1
    )


@pytest.mark.parametrize("kind", ["straight", "turned"])
def test_labels_return_to_the_voxels_they_were_made_for(kind: str, request: pytest.FixtureRequest) -> None:
    volume, result = request.getfixturevalue(kind)
    level = np.percentile(volume.array[volume.array > 0], 99.9) * 0.3
    back = to_grid_of(volume, (result.array > 0.3).astype(np.uint8), result.affine) > 0
    expected = volume.array > level
    dice = 2 * (back & expected).sum() / (back.sum() + expected.sum())
    assert back.shape == volume.array.shape
    assert dice > (0.999 if kind == "straight" else 0.95)
    np.testing.assert_allclose(centre_of_mass(back, volume.affine), centre_of_mass(expected, volume.affine), atol=0.1)


def test_of_a_field_of_view_taller_than_the_grid_the_top_of_the_head_stays() -> None:
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    array = np.zeros((20, 20, 90), dtype=np.float32)
    array[4:16, 4:16, 5:85] = 1 + np.random.default_rng(0).random((12, 12, 80))
    result = conform(Volume(array, affine, {}))
    inside = np.argwhere(result.array > 0.3) @ result.affine[:3, :3].T + result.affine[:3, 3]
    assert inside[:, 2].max() == pytest.approx(84 * 4, abs=4)
    assert result.affine[2, 3] == pytest.approx(84 * 4 + 10, abs=1)


def test_a_scan_below_zero_is_lifted_and_the_outside_is_dark(straight: tuple[Volume, Conformed]) -> None:
    volume, result = straight
    lifted = conform(volume._replace(array=volume.array - 7))
    assert np.abs(lifted.array - result.array).max() <= 1 / 255 + 1e-6
