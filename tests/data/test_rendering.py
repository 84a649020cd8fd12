"""Rendering: the same seed, the same scan; tissues as bright as they should be; grids and poses as asked."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from neuromf.data.fields import bending, blur, rotation, smooth_field, upsample
from neuromf.data.label_maps import LabelMap
from neuromf.data.label_table import IS_BRAIN, LABELS, MIRROR_ROWS, NUMBERS, numbers_of
from neuromf.data.phantom import phantom_labels
from neuromf.data.rendering import Rendering, load_label_map, render
from neuromf.errors import ScanError, UserError

SMALL = (40, 48, 40)


@pytest.fixture(scope="module")
def head() -> LabelMap:
    return phantom_labels(3, size=(80, 96, 80), spacing_mm=2.0, lesion=True)


@pytest.fixture(scope="module")
def real_head(shared_data: Path) -> LabelMap:
    return load_label_map(shared_data / "synthseg_labels" / "training_seg_02.nii.gz")


def median(scan: Rendering, *structures: str) -> float:
    return float(np.median(scan.volume[0][np.isin(scan.labels, numbers_of(*structures))]))


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_scan(head):
    first, again, other = (render(head, seed, size=SMALL, spacing_mm=4.0) for seed in (5, 5, 6))
    assert np.array_equal(first.volume, again.volume)
    assert np.array_equal(first.labels, again.labels)
    assert np.abs(first.volume - other.volume).mean() > 0.02


def test_one_seed_is_one_head_in_both_contrasts_and_stripped(head):
    whole = render(head, 2, size=SMALL, spacing_mm=4.0)
    flair = render(head, 2, size=SMALL, spacing_mm=4.0, contrast="FLAIR")
    stripped = render(head, 2, size=SMALL, spacing_mm=4.0, stripped=True)
    brain = np.isin(whole.labels, NUMBERS[IS_BRAIN])
    assert np.array_equal(whole.labels, flair.labels)
    assert np.array_equal(whole.labels[brain], stripped.labels[brain])


@pytest.mark.parametrize(("size", "spacing_mm"), [((48, 64, 48), 1.0), ((32, 32, 32), 2.0), ((20, 24, 28), 6.0)])
def test_size_and_spacing_are_honoured_and_values_lie_in_0_to_1(head, size, spacing_mm):
    scan = render(head, 0, size=size, spacing_mm=spacing_mm)
    assert scan.volume.shape == (1, *size)
    assert scan.volume.dtype == np.float32
    assert scan.labels.shape == size
    assert np.allclose(np.diag(scan.affine), [spacing_mm] * 3 + [1])
    assert scan.volume.min() >= 0
    assert scan.volume.max() == 1
    assert set(np.unique(scan.labels)) <= set(NUMBERS.tolist())


def test_without_pose_and_bending_the_labels_are_those_of_the_map(head):
    scan = render(
        head, 0, size=(80, 96, 80), spacing_mm=2.0, deform=False, affine_jitter=False, centre_mm=(0.0, 0.0, 0.0)
    )
    assert np.array_equal(scan.labels, head.labels)
    assert np.allclose(scan.affine, head.affine)


def test_the_centre_moves_the_block_to_where_it_is_asked(head):
    scan = render(
        head, 0, size=(20, 22, 24), spacing_mm=2.0, deform=False, affine_jitter=False, centre_mm=(10.0, -20.0, 6.0)
    )
    assert np.array_equal(scan.labels, head.labels[35:55, 27:49, 31:55])
    assert np.allclose(scan.affine[:3, 3] + (np.array([20, 22, 24]) - 1) * 1.0, [10, -20, 6])


def test_white_matter_is_brighter_than_cortex_and_cortex_than_fluid_in_t1(head):
    for seed in range(4):
        scan = render(head, seed, spacing_mm=3.0)
        white = median(scan, "cerebral white matter")
        assert white > 1.1 * median(scan, "cerebral cortex") > 1.2 * median(scan, "lateral ventricle", "csf")


def test_flair_has_dark_fluid_brighter_cortex_and_bright_lesions(head):
    scan = render(head, 1, contrast="FLAIR", size=(80, 96, 80), spacing_mm=2.0)
    white = median(scan, "cerebral white matter")
    assert median(scan, "csf", "lateral ventricle") < 0.6 * white
    assert white < median(scan, "cerebral cortex")
    assert median(scan, "white matter lesion") > 1.25 * white


def test_stripped_is_zero_beyond_one_voxel_around_the_brain(head):
    scan = render(head, 4, size=(48, 56, 48), stripped=True)
    brain = np.isin(scan.labels, NUMBERS[IS_BRAIN])
    rim = np.zeros_like(brain)
    for step in np.ndindex(3, 3, 3):
        rim |= np.roll(brain, np.array(step) - 1, axis=(0, 1, 2))
    assert (scan.volume[0][~rim] == 0).all()
    assert (scan.volume[0][brain] > 0).mean() > 0.99
    assert not np.isin(scan.labels, numbers_of("skin", "cortical bone", "soft tissue")).any()


def test_a_mirrored_head_keeps_left_labels_on_the_left(head):
    def mean_x(scan: Rendering, number: int) -> float:
        return float(np.nonzero(scan.labels == number)[0].mean())

    # The lesions of this head are not symmetric: a mirrored head has them on the other side.
    sides = set()
    for seed in range(8):
        scan = render(head, seed, size=(64, 64, 64), spacing_mm=3.0, deform=False)
        assert mean_x(scan, 2) < mean_x(scan, 41)
        sides.add(bool((scan.labels == 25).sum() > (scan.labels == 57).sum()))
    assert sides == {True, False}


def test_a_block_beside_the_head_is_noise_not_a_failure(head):
    scan = render(head, 0, size=(8, 8, 8), centre_mm=(500.0, 0.0, 0.0))
    assert (scan.labels == 0).all()
    assert np.isfinite(scan.volume).all()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"contrast": "T2"}, "no contrast 'T2'"),
        ({"size": (0, 8, 8)}, "size"),
        ({"spacing_mm": 0.0}, "spacing"),
        ({"supersample": 0}, "supersample"),
        ({"seed": -1}, "seed"),
    ],
)
def test_requests_that_make_no_sense_are_refused(head, wrong, told):
    with pytest.raises(UserError, match=told):
        render(head, **({"seed": 0} | wrong))


def test_label_maps_stored_as_float_in_any_orientation_load_the_same(tmp_path):
    labels = np.zeros((6, 7, 8), dtype=np.int16)
    labels[1:3, 2:5, 3:6], labels[4, 2:4, 5] = 2, 41
    plain = load_label_map(save(tmp_path / "ras.nii.gz", labels))
    flipped = save(tmp_path / "lia.nii.gz", labels[::-1].astype(np.float32), np.diag([-1.0, 1.0, 1.0, 1.0]))
    turned = load_label_map(flipped)
    assert np.array_equal(plain.labels, labels)
    assert np.array_equal(turned.labels, labels)
    assert np.array_equal(NUMBERS[plain.rows], labels)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda a: a + 0.3, "not whole numbers"),
        (lambda a: np.where(a == 2, 999, a), "999"),
        (lambda a: np.where(a == 2, 1, a), "not known here: 1"),
        (lambda a: a - 1, "-1"),
        (lambda a: np.stack([a, a], axis=-1), "4"),
    ],
)
def test_what_is_no_label_map_is_refused_and_named(tmp_path, change, told):
    labels = np.zeros((6, 7, 8), dtype=np.float32)
    labels[1:3, 2:5, 3:6] = 2
    with pytest.raises(ScanError, match=told):
        load_label_map(save(tmp_path / "wrong.nii.gz", change(labels).astype(np.float32)))


def test_an_unknown_label_is_answered_with_those_that_are_known(tmp_path):
    labels = np.full((5, 5, 5), 2, dtype=np.int16)
    labels[2, 2, 2] = 77
    with pytest.raises(ScanError, match=r"10 thalamus") as caught:
        load_label_map(save(tmp_path / "wrong.nii.gz", labels))
    assert "77" in caught.value.message


def test_label_table_mirrors_onto_itself():
    assert np.array_equal(MIRROR_ROWS[MIRROR_ROWS], np.arange(len(LABELS)))
    assert all(LABELS[m].name == label.name for label, m in zip(LABELS, MIRROR_ROWS, strict=True))
    assert (np.diff(NUMBERS) > 0).all()


def test_smooth_fields_have_unit_variance_everywhere():
    rng = np.random.default_rng(0)
    fields = smooth_field(rng, (12, 10, 8), (120.0, 100.0, 80.0), 25.0, channels=3000)
    assert torch.allclose(fields.var(dim=0), torch.ones(12, 10, 8), atol=0.15)
    assert fields.mean(dim=0).abs().max() < 0.1


def test_interpolation_is_exact_on_straight_lines_and_blur_keeps_constants():
    line = torch.arange(6, dtype=torch.float32)[:, None, None].expand(6, 5, 4)
    finer = upsample(line, (12, 10, 8))
    assert torch.allclose(finer[:, 0, 0], (torch.arange(12) + 0.5) / 2 - 0.5)
    assert torch.allclose(upsample(line, (12, 10, 8), (slice(2, 5), slice(0, 3), slice(1, 2))), finer[2:5, :3, 1:2])
    assert torch.allclose(blur(torch.full((6, 7, 8), 3.0), 0.5), torch.tensor(3.0))


def test_rotations_keep_lengths_and_orientation():
    matrix = rotation(np.array([10.0, -20.0, 30.0]))
    assert np.allclose(matrix @ matrix.T, np.eye(3))
    assert np.isclose(np.linalg.det(matrix), 1)
    assert np.allclose(rotation(np.array([0.0, 0.0, 90.0])) @ [1, 0, 0], [0, 1, 0])


def test_bending_has_no_folds_at_its_greatest_strength():
    for seed in range(5):
        u = bending(np.random.default_rng(seed), (192.0, 192.0, 192.0), sd_mm=2.0)
        step = 192 / u.shape[1]
        gradient = torch.stack([torch.stack(torch.gradient(c, spacing=step)) for c in u])
        jacobian = gradient.permute(2, 3, 4, 0, 1) + torch.eye(3)
        assert torch.linalg.det(jacobian).min() > 0.2


def test_real_heads_have_the_grey_values_of_the_recipe(real_head):
    """Medians relative to white matter, mean over scans; one scan differs from the next by about 0.07."""
    recipe = {
        "cerebral cortex": 0.70,
        "cerebellar cortex": 0.68,
        "thalamus": 0.90,
        "putamen": 0.88,
        "caudate": 0.73,
        "hippocampus": 0.71,
        "pallidum": 1.00,
        "lateral ventricle": 0.32,
    }
    scans = [render(real_head, seed, size=(56, 64, 56)) for seed in range(8)]
    white = np.array([median(scan, "cerebral white matter") for scan in scans])
    for name, expected in recipe.items():
        fractions = np.array([median(scan, name) for scan in scans]) / white
        assert fractions.mean() == pytest.approx(expected, abs=0.1), name
        assert np.abs(fractions - expected).max() < 0.3, name


def test_the_number_of_threads_changes_no_bit_and_stays_as_it_was(head):
    before = torch.get_num_threads()
    many = render(head, 1, size=SMALL, spacing_mm=4.0)
    torch.set_num_threads(1)
    try:
        one = render(head, 1, size=SMALL, spacing_mm=4.0)
    finally:
        torch.set_num_threads(before)
    assert torch.get_num_threads() == before
    assert np.array_equal(one.volume, many.volume)


def test_real_heads_keep_their_brain_volume(real_head):
    scan = render(real_head, 0, affine_jitter=False)
    brain_ml = np.isin(scan.labels, NUMBERS[IS_BRAIN]).sum() * 3.0**3 / 1000
    assert brain_ml == pytest.approx(1110 + 53 + 4, rel=0.06)
