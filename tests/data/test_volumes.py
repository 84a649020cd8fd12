from __future__ import annotations

import gzip
import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import apply_orientation, inv_ornt_aff

from neuromf.data.volumes import load_volume, nifti_stem, save_volume, spacing_of
from neuromf.errors import ScanError, UserError

AFFINE = np.array([[0.9, 0, 0.05, -30], [0, 1.1, 0, -40], [-0.04, 0, 2.0, -20], [0, 0, 0, 1.0]])
ORIENTATIONS = [
    np.array(list(zip(axes, signs, strict=True)))
    for axes in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


def scan(shape=(5, 6, 7), seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32)


def write(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def patch(path: Path, field: str, value) -> Path:
    """Set a header field behind nibabel's back, which would repair it."""
    content = bytearray(path.read_bytes())
    header = nib.Nifti1Header(bytes(content[:348]), check=False)
    header[field] = value
    path.write_bytes(header.binaryblock + bytes(content[348:]))
    return path


def test_there_are_48_orientations():
    assert len({tuple(o.ravel()) for o in ORIENTATIONS}) == 48


@pytest.mark.parametrize("orientation", ORIENTATIONS, ids=lambda o: "".join(map(str, o.astype(int).ravel())))
def test_every_orientation_of_a_scan_gives_the_same_array(tmp_path, orientation):
    array = scan()
    stored = np.ascontiguousarray(apply_orientation(array, orientation))
    volume = load_volume(write(tmp_path / "a.nii.gz", stored, AFFINE @ inv_ornt_aff(orientation, array.shape)))
    assert volume.array.dtype == np.float32
    assert np.array_equal(volume.array, array)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-4)
    assert spacing_of(volume.affine) == pytest.approx(np.linalg.norm(AFFINE[:3, :3], axis=0), abs=1e-5)
    assert volume.source["shape"] == list(stored.shape)


def test_slope_and_intercept_of_the_header_are_applied(tmp_path):
    image = nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4))
    image.header.set_slope_inter(0.5, 10)
    nib.save(image, tmp_path / "a.nii.gz")
    expected = np.asarray(nib.load(tmp_path / "a.nii.gz").get_fdata(), dtype=np.float32)
    assert np.array_equal(load_volume(tmp_path / "a.nii.gz").array, expected)


def test_a_trailing_axis_of_one_is_a_volume(tmp_path):
    array = scan()
    assert np.array_equal(load_volume(write(tmp_path / "a.nii", array[..., None, None])).array, array)


def test_nifti2_and_wrong_suffix_are_read_by_content(tmp_path):
    array = scan()
    nib.save(nib.Nifti2Image(array, AFFINE), tmp_path / "two.nii")
    assert np.array_equal(load_volume(tmp_path / "two.nii").array, array)
    (tmp_path / "plain.nii.gz").write_bytes((tmp_path / "two.nii").read_bytes())
    assert np.array_equal(load_volume(tmp_path / "plain.nii.gz").array, array)


def test_an_unstated_orientation_is_recorded(tmp_path):
    image = nib.Nifti1Image(scan(), np.eye(4))
    image.set_sform(None, code=0)
    image.set_qform(None, code=0)
    nib.save(image, tmp_path / "a.nii")
    assert load_volume(tmp_path / "a.nii").source["orientation_from"] == "none"


def refused(path: Path, *words: str) -> None:
    with pytest.raises(ScanError) as caught:
        load_volume(path)
    for word in (*words, path.name):
        assert word in caught.value.message
    assert caught.value.hint


def test_not_a_nifti_is_refused(tmp_path):
    for name, content in {"a.nii": b"hello" * 200, "b.nii.gz": gzip.compress(b"no"), "c.nii": b""}.items():
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, "NIfTI")


def test_an_absent_file_is_refused(tmp_path):
    refused(tmp_path / "absent.nii.gz", "does not exist")


def test_a_link_to_a_file_that_was_not_fetched_says_how_to_fetch_it(tmp_path):
    (tmp_path / "a.nii.gz").symlink_to(".git/annex/objects/x")
    with pytest.raises(ScanError, match="a link to a file that is not here") as caught:
        load_volume(tmp_path / "a.nii.gz")
    assert "datalad get" in caught.value.hint


@pytest.mark.parametrize("kept", [0.5, 0.9, -4])
def test_a_truncated_gz_is_refused(tmp_path, kept):
    path = write(tmp_path / "a.nii.gz", scan((20, 20, 20)))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept) if kept > 0 else kept])
    refused(path, "truncated")


def test_a_flipped_bit_in_a_gz_is_refused(tmp_path):
    path = write(tmp_path / "a.nii.gz", scan((20, 20, 20)))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    refused(path, "damaged")


def test_a_truncated_nii_is_refused(tmp_path):
    path = write(tmp_path / "a.nii", scan())
    path.write_bytes(path.read_bytes()[:-8])
    refused(path, "truncated")


def test_a_header_that_promises_a_huge_volume_is_refused_without_allocating_it(tmp_path):
    refused(patch(write(tmp_path / "a.nii", scan()), "dim", [3, 30000, 30000, 30000, 1, 1, 1, 1]), "truncated")


def test_an_unknown_data_type_is_refused(tmp_path):
    refused(patch(write(tmp_path / "a.nii", scan()), "datatype", 77), "header")


def test_4d_is_refused_with_the_number_of_volumes(tmp_path):
    refused(write(tmp_path / "a.nii.gz", scan((5, 6, 7, 3))), "4-D", "3 volumes", "5 x 6 x 7 x 3")


def test_a_slice_is_refused(tmp_path):
    refused(write(tmp_path / "a.nii", scan((5, 6, 1))), "5 x 6")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_refused_with_their_share(tmp_path, value):
    array = scan((10, 10, 10))
    array.flat[:50] = value
    refused(write(tmp_path / "a.nii.gz", array), "5.00%", "NaN or Inf")


def test_a_constant_scan_is_refused(tmp_path):
    refused(write(tmp_path / "a.nii.gz", np.full((5, 6, 7), 3, np.float32)), "3", "no image")


@pytest.mark.parametrize("spacing", [0, -1, np.nan, np.inf])
def test_zero_negative_or_infinite_spacing_is_refused(tmp_path, spacing):
    path = write(tmp_path / "a.nii", scan())
    refused(patch(path, "pixdim", [1, 1, spacing, 1, 0, 0, 0, 0]), "voxel size", "positive")


def test_a_zero_column_and_a_singular_affine_are_refused(tmp_path):
    path = write(tmp_path / "a.nii", scan(), np.eye(4))
    refused(patch(path, "srow_y", [0, 0, 0, 0]), "voxel size", "1 x 0 x 1")
    for row in ("srow_x", "srow_y", "srow_z"):
        patch(path, row, [1, 2, 3, 0])
    refused(path, "singular")
    refused(patch(path, "srow_x", [np.nan, 0, 0, 0]), "NaN")


def test_complex_and_rgb_are_refused(tmp_path):
    refused(write(tmp_path / "complex.nii", scan().astype(np.complex64)), "complex")
    colours = np.zeros((5, 6, 7), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    refused(write(tmp_path / "rgb.nii", colours), "RGB")


def test_save_and_load_round_trip_with_the_same_bytes_each_time(tmp_path):
    array = scan()
    for name in ("a.nii.gz", "b.nii.gz"):
        save_volume(tmp_path / name, array[None], AFFINE, header_description="synthetic")
    volume = load_volume(tmp_path / "a.nii.gz")
    assert np.array_equal(volume.array, array)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    assert bytes(nib.load(tmp_path / "a.nii.gz").header["descrip"].item()) == b"synthetic"


def test_integer_output_is_rounded_and_limited_to_its_range(tmp_path):
    array = np.array([-5, 0.4, 0.6, 3e5], np.float32).reshape(2, 2, 1).repeat(2, axis=2)
    save_volume(tmp_path / "a.nii", array, np.eye(4), dtype=np.uint8)
    assert np.asarray(nib.load(tmp_path / "a.nii").dataobj)[..., 0].ravel().tolist() == [0, 0, 1, 255]


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"\.nii\.gz"):
        save_volume(tmp_path / "a.mgz", scan(), np.eye(4))


def test_stem_drops_only_the_nifti_suffix():
    assert [nifti_stem(n) for n in ("a.b.nii.gz", "x.NII", "y.pt")] == ["a.b", "x", "y.pt"]


def test_real_scans_of_one_subject_in_two_orientations_load_as_ras(shared_data):
    for name, orientation in {"t1_crop": "LIA", "MNI152_T1_2mm": "LAS", "chris_t1": "RAS"}.items():
        volume = load_volume(shared_data / "wholebrain" / f"{name}.nii.gz")
        assert volume.source["orientation"] == orientation
        assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")
