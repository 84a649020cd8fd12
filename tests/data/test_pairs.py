"""Which mask belongs to which image, and what is refused of masks."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from neuromf.data.pairs import Pairs, find_pairs, image_files, load_mask, mask_on_grid
from neuromf.data.preprocessing import Preprocessing, preprocess
from neuromf.data.sources import find_sources
from neuromf.data.volumes import load_volume, save_volume
from neuromf.errors import ScanError, UserError

SHAPE = (20, 24, 18)
AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])


def blob(centre: Sequence[float] = (12, 9, 8), radius: float = 3.5) -> np.ndarray:
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    return np.linalg.norm(grid - np.asarray(centre), axis=-1) <= radius


def head(lesion: np.ndarray) -> np.ndarray:
    return 100.0 * blob((10, 12, 9), 8.0) + 300.0 * lesion


def write(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    save_volume(path, array, affine, dtype=np.float32)
    return path


def folders(tmp_path: Path, names: Sequence[tuple[str, str]]) -> tuple[Path, Path]:
    for image, mask in names:
        write(tmp_path / "images" / f"{image}.nii.gz", head(blob()))
        write(tmp_path / "masks" / f"{mask}.nii.gz", blob())
    return tmp_path / "images", tmp_path / "masks"


def paired(found: Pairs) -> dict[str, str]:
    return {pair.scan.subject: pair.mask.name for pair in found.pairs}


# --- who belongs to whom ---------------------------------------------------------------------------------------------


def test_folders_are_paired_by_name_whatever_stands_at_its_end(tmp_path: Path) -> None:
    names = [("a", "a"), ("b_T1", "b_mask"), ("sub-03_FLAIR", "sub-03_label-lesion_mask"), ("d", "d_lesion_seg")]
    images, masks = folders(tmp_path, names)
    assert paired(find_pairs(find_sources([images]), masks)) == {i: f"{m}.nii.gz" for i, m in names}


def test_masks_may_lie_below_their_images(tmp_path: Path) -> None:
    images, masks = folders(tmp_path, [("a", "a"), ("b", "b")])
    shutil.move(masks, images / "masks")
    files = image_files(images, images / "masks")
    assert [path.name for path in files] == ["a.nii.gz", "b.nii.gz"]
    assert len(find_pairs(find_sources(files), images / "masks").pairs) == 2
    assert image_files(images, tmp_path / "elsewhere") == [images]


def test_a_table_names_both(tmp_path: Path) -> None:
    folders(tmp_path, [("a", "x"), ("b", "y")])
    table = tmp_path / "pairs.csv"
    table.write_text("path,mask,split\nimages/a.nii.gz,masks/y.nii.gz,train\nimages/b.nii.gz,masks/x.nii.gz,test\n")
    found = find_pairs(find_sources([table]))
    assert paired(found) == {"a": "y.nii.gz", "b": "x.nii.gz"}
    assert [pair.scan.split for pair in found.pairs] == ["train", "test"]
    table.write_text("path,mask\nimages/a.nii.gz,masks/no.nii.gz\n")
    with pytest.raises(UserError, match=r"1 masks do not exist: .*no\.nii\.gz"):
        find_pairs(find_sources([table]))
    table.write_text("path,mask\nimages/a.nii.gz,masks/x.nii.gz\nimages/b.nii.gz,\n")
    with pytest.raises(UserError, match="1 rows have no 'mask': b"):
        find_pairs(find_sources([table]))


def test_bids_masks_are_found_among_the_derivatives_and_controls_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.10.0"}')
    for subject in ("01", "02", "03"):
        write(tmp_path / f"sub-{subject}/anat/sub-{subject}_FLAIR.nii.gz", head(blob()))
    lesions = tmp_path / "derivatives/fcd"
    for subject in ("01", "03"):
        write(lesions / f"sub-{subject}/anat/sub-{subject}_space-orig_label-lesion_mask.nii.gz", blob())
        write(lesions / f"sub-{subject}/anat/sub-{subject}_label-brain_mask.nii.gz", blob())
    found = find_pairs(find_sources([tmp_path]))
    assert sorted(paired(found)) == ["sub-01_FLAIR", "sub-03_FLAIR"]
    assert all("label-lesion" in name for name in paired(found).values())
    assert found.unmasked == ["sub-02_FLAIR"]


@pytest.mark.parametrize(
    ("gone", "said"), [("masks", "1 of 2 images have no mask: b"), ("images", r"1 masks belong to no image: .*b\.nii")]
)
def test_a_missing_partner_is_named(gone: str, said: str, tmp_path: Path) -> None:
    images, masks = folders(tmp_path, [("a", "a"), ("b", "b")])
    (tmp_path / gone / "b.nii.gz").unlink()
    with pytest.raises(UserError, match=said):
        find_pairs(find_sources([images]), masks)


def test_images_without_a_place_to_look_for_masks_are_refused(tmp_path: Path) -> None:
    images, masks = folders(tmp_path, [("a", "a")])
    with pytest.raises(UserError, match=r"without masks[\s\S]*--masks"):
        find_pairs(find_sources([images]))
    with pytest.raises(UserError, match="no folder of masks"):
        find_pairs(find_sources([images]), tmp_path / "absent")
    write(masks / "a_mask.nii.gz", blob())
    with pytest.raises(UserError, match="2 masks"):
        find_pairs(find_sources([images]), masks)


# --- what a mask may be ----------------------------------------------------------------------------------------------


def refused(tmp_path: Path, array: np.ndarray, affine: np.ndarray = AFFINE, labels: tuple[int, ...] = ()) -> str:
    image = load_volume(write(tmp_path / "image.nii.gz", head(blob())))
    with pytest.raises(ScanError) as error:
        load_mask(write(tmp_path / "mask.nii.gz", array, affine), image, labels)
    return str(error.value)


def test_an_empty_mask_is_refused(tmp_path: Path) -> None:
    assert "the mask is empty" in refused(tmp_path, np.zeros(SHAPE))


def test_a_mask_of_several_values_is_refused_and_labels_choose(tmp_path: Path) -> None:
    both = blob() + 2.0 * blob((5, 12, 9), 2.0)
    assert "3 values (0, 1, 2)" in refused(tmp_path, both)
    assert "--label 1,2" in refused(tmp_path, both)
    assert "values" in refused(tmp_path, 0.3 * blob() + 0.5 * blob((12, 9, 8), 2.0))
    assert "no voxel has the label 7" in refused(tmp_path, both, labels=(7,))
    image = load_volume(tmp_path / "image.nii.gz")
    mask = load_mask(write(tmp_path / "mask.nii.gz", both), image, (2,))
    assert np.array_equal(mask, blob((5, 12, 9), 2.0))


def test_a_mask_on_another_grid_is_refused(tmp_path: Path) -> None:
    assert "20 x 24 x 16 voxels, its image 20 x 24 x 18" in refused(tmp_path, blob()[..., :16])
    shifted = AFFINE.copy()
    shifted[0, 3] = 3.0
    assert "3 mm beside its image" in refused(tmp_path, blob(), shifted)
    coarse = np.diag([2.2, 2.2, 2.2, 1.0])
    assert "beside its image" in refused(tmp_path, blob(), coarse)


def test_a_mask_stored_in_another_orientation_still_fits(tmp_path: Path) -> None:
    image = load_volume(write(tmp_path / "image.nii.gz", head(blob())))
    turned = nib.Nifti1Image(255 * blob().astype(np.uint8), AFFINE).as_reoriented(np.array([[1, 1], [0, -1], [2, 1]]))
    nib.save(turned, tmp_path / "turned.nii.gz")
    assert np.array_equal(load_mask(tmp_path / "turned.nii.gz", image), blob())


def test_on_the_grid_a_mask_covers_what_its_image_shows(tmp_path: Path) -> None:
    volume = load_volume(write(tmp_path / "image.nii.gz", head(blob())))
    prepared = preprocess(volume, Preprocessing(size=(16, 16, 16), spacing_mm=3.0))
    mask = mask_on_grid(tmp_path / "mask.nii.gz", blob(), volume.affine, prepared.record)
    bright = prepared.array > 0.6 * prepared.array.max()
    assert mask.shape == prepared.array.shape
    assert 2 * (mask & bright).sum() / (mask.sum() + bright.sum()) > 0.85


@pytest.mark.parametrize(
    ("lesion", "said"), [(blob((19, 23, 17), 1.0), "lie outside"), (blob((12, 9, 8), 0.5), "fill no voxel")]
)
def test_a_mask_of_which_nothing_is_left_is_refused(lesion: np.ndarray, said: str, tmp_path: Path) -> None:
    volume = load_volume(write(tmp_path / "image.nii.gz", head(blob())))
    prepared = preprocess(volume, Preprocessing(size=(8, 8, 8), spacing_mm=4.0))
    with pytest.raises(ScanError, match=said):
        mask_on_grid(tmp_path / "mask.nii.gz", lesion, volume.affine, prepared.record)
