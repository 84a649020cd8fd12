from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from neuromf.data.preprocessing import (
    Preprocessing,
    crop_or_pad,
    head_mask,
    preprocess,
    resample,
)
from neuromf.data.restoration import restore_intensity
from neuromf.data.volumes import Volume, spacing_of
from neuromf.errors import ScanError, UserError

OBLIQUE = np.array([[0.98, -0.17, 0, -20], [0.17, 0.98, 0, 10], [0, 0, 1, 5], [0, 0, 0, 1.0]])


def ball(shape=(40, 44, 48), centre=(18, 25, 22), radius=(10, 12, 11), noise=2.0) -> np.ndarray:
    """A bright ellipsoid in dim noise; coordinates in voxels."""
    grid = np.indices(shape).reshape(3, -1)
    distance = (((grid - np.array(centre)[:, None]) / np.array(radius)[:, None]) ** 2).sum(0)
    rng = np.random.default_rng(0)
    array = np.where(distance <= 1, 100 + 20 * np.cos(3 * distance), 0) + noise * rng.random(distance.shape)
    return array.reshape(shape).astype(np.float32)


def volume(array: np.ndarray, affine: np.ndarray = OBLIQUE) -> Volume:
    return Volume(array, affine, {"orientation": "RAS"})


def blob() -> np.ndarray:
    """A Gaussian of 4 voxels about (18, 25, 22): smooth, so that its centroid survives any sampling."""
    offset = np.indices((40, 44, 48)) - np.array([18, 25, 22]).reshape(3, 1, 1, 1)
    return np.exp(-0.5 * (offset**2).sum(0) / 4**2).astype(np.float32)


def centroid_mm(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    index = np.indices(array.shape).reshape(3, -1)
    middle = (index * array.ravel()).sum(1) / array.sum()
    return affine[:3, :3] @ middle + affine[:3, 3]


@pytest.mark.parametrize("spacing", [None, 1.0, 0.7, 1.6, 2.0, (1.0, 2.0, 0.8)])
def test_a_landmark_keeps_its_world_position(spacing):
    after = preprocess(volume(blob()), Preprocessing(size=(64, 64, 72), spacing_mm=spacing))
    landmark_mm = OBLIQUE @ (18, 25, 22, 1)
    assert np.abs(centroid_mm(after.array[0], after.affine) - landmark_mm[:3]).max() < 0.01
    if spacing is not None:
        assert spacing_of(after.affine) == pytest.approx(np.broadcast_to(spacing, 3), rel=1e-3)


def test_a_linear_ramp_in_mm_is_exact_inside_after_refining():
    i = np.arange(20.0)
    array = (i[:, None, None] + 2 * i[None, :, None] - i[None, None, :]).astype(np.float32)
    fine, affine = resample(array, np.diag([1, 1, 1, 1.0]), (0.8, 0.8, 0.8))
    world = affine[:3, :3] @ np.indices(fine.shape).reshape(3, -1) + affine[:3, 3:]
    inside = ((world >= 0) & (world <= 19)).all(0)
    np.testing.assert_allclose(fine.ravel()[inside], (world[0] + 2 * world[1] - world[2])[inside], atol=1e-4)


def test_coarsening_does_not_alias():
    # The finest checkerboard holds no detail a grid of twice the spacing could show: its mean remains.
    array = (np.indices((32, 32, 32)).sum(0) % 2).astype(np.float32)
    coarse, _ = resample(array, np.eye(4), (3.0, 3.0, 3.0))
    assert np.abs(coarse - 0.5).max() < 0.05


def test_own_spacing_and_equal_spacing_change_no_voxel():
    array = ball()
    for spacing in (None, (1.0, 1.0, 1.0), (1.00001, 1.0, 1.0)):
        same, affine = resample(array, np.eye(4), spacing)
        assert same is array
        assert np.array_equal(affine, np.eye(4))


def test_nothing_is_stretched_to_the_size():
    array = ball()
    prepared = preprocess(volume(array), Preprocessing(size=(64, 32, 56), spacing_mm=None))
    restored = restore_intensity(prepared.array[0], prepared.record)
    start, inside = prepared.record["crop_start"], tuple(slice(*axis) for axis in prepared.record["inside"])
    own = tuple(slice(axis.start + s, axis.stop + s) for axis, s in zip(inside, start, strict=True))
    np.testing.assert_allclose(restored[inside], array[own], atol=1e-4)
    assert spacing_of(prepared.affine) == pytest.approx(spacing_of(OBLIQUE))


def test_the_box_is_centred_on_the_head_and_not_on_the_grid():
    array = ball(shape=(60, 60, 60), centre=(20, 38, 33))
    head = preprocess(volume(array), Preprocessing((32, 32, 32), None)).record
    grid = preprocess(volume(array), Preprocessing((32, 32, 32), None, centre="grid")).record
    assert np.abs(np.array(head["crop_start"]) + 15.5 - (20, 38, 33)).max() <= 1
    assert grid["crop_start"] == [14, 14, 14]
    assert head["foreground_lost"] == 0
    assert grid["foreground_lost"] > 0.05


def test_a_field_of_view_that_fits_is_kept_whole():
    array = ball(shape=(30, 31, 32), centre=(5, 20, 16), radius=(4, 8, 8))
    record = preprocess(volume(array), Preprocessing((32, 32, 32), None)).record
    assert [stop - start for start, stop in record["inside"]] == [30, 31, 32]


def test_a_head_taller_than_the_box_keeps_its_top():
    array = ball(shape=(32, 32, 64), centre=(16, 16, 32), radius=(8, 8, 24))
    prepared = preprocess(volume(array), Preprocessing((32, 32, 40), None))
    assert prepared.record["crop_start"][2] == 57 - 40
    assert 0.05 < prepared.record["foreground_lost"] < 0.3


def test_head_mask_is_the_head_without_noise_and_specks():
    array = ball(noise=15)
    array[2, 2, 2] = array[36:39, 40:43, 44:47] = 200
    truth = ball(noise=0) > 0
    mask = head_mask(array)
    assert not mask[:4].any()
    assert not mask[36:, 40:, 44:].any()
    assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.97


def test_intensity_maps_p0_to_0_and_p995_to_1_and_keeps_what_lies_above():
    array = ball()
    prepared = preprocess(volume(array), Preprocessing(array.shape, None))
    assert prepared.array.dtype == np.float32
    assert prepared.array.min() == 0
    assert np.percentile(prepared.array, 99.5) == pytest.approx(1, abs=1e-6)
    assert prepared.array.max() > 1
    assert preprocess(volume(array), Preprocessing(array.shape, None, clip_intensity=True)).array.max() == 1


def test_padding_is_zero_and_does_not_move_the_percentiles():
    array = 50 + ball()
    tight = preprocess(volume(array), Preprocessing(array.shape, None))
    padded = preprocess(volume(array), Preprocessing((64, 64, 64), None))
    assert padded.record["intensity"] == tight.record["intensity"]
    box = tuple(slice(*axis) for axis in padded.record["inside"])
    assert np.array_equal(padded.array[0][box], tight.array[0])
    assert padded.array.sum() == pytest.approx(tight.array.sum())


def test_of_the_foreground_p995_does_not_depend_on_the_air_around_the_head():
    rng = np.random.default_rng(4)
    array = np.zeros((40, 40, 40), np.float32)
    array[12:28, 12:28, 12:28] = rng.uniform(50, 150, (16, 16, 16))
    spec = Preprocessing((40, 40, 40), None, intensity="foreground")
    wide, tight = (
        preprocess(volume(cut), replace(spec, size=cut.shape)).record["intensity"]
        for cut in (array, array[10:30, 10:30, 10:30])
    )
    assert wide["upper"] == tight["upper"] == pytest.approx(np.percentile(array[array > 0], 99.5), rel=1e-3)
    assert wide["lower"] == tight["lower"] == 0
    assert wide["foreground_share"] == pytest.approx(0.4**3, rel=0.05)
    everywhere = preprocess(volume(array), replace(spec, intensity="percentile")).record["intensity"]
    assert everywhere["upper"] < wide["upper"]
    with pytest.raises(UserError, match="did you mean 'foreground'"):
        replace(spec, intensity="forground")


def test_settings_of_before_there_was_a_choice_of_intensity_have_the_same_digest():
    assert Preprocessing((8, 8, 8), 1.0).to_dict().keys() == {
        "size",
        "spacing_mm",
        "upper_percentile",
        "clip_intensity",
        "centre",
    }
    changed = Preprocessing((8, 8, 8), 1.0, intensity="foreground")
    assert Preprocessing.from_dict(changed.to_dict()) == changed
    assert changed.digest != Preprocessing((8, 8, 8), 1.0).digest


def test_the_record_survives_json_unchanged():
    record = preprocess(volume(ball()), Preprocessing((32, 32, 32), 2)).record
    assert json.loads(json.dumps(record)) == record


def test_settings_round_trip_and_digest():
    spec = Preprocessing([64, 64, 32], 2)
    assert Preprocessing.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert spec.digest == Preprocessing((64, 64, 32), (2.0, 2.0, 2.0)).digest
    assert spec.digest != Preprocessing((64, 64, 32), 2, clip_intensity=True).digest
    with pytest.raises(UserError, match="sise"):
        Preprocessing.from_dict(spec.to_dict() | {"sise": 3})


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": (64, 64)},
        {"size": (64, 64, 0)},
        {"size": (64, 64, 1.5)},
        {"spacing_mm": 0},
        {"spacing_mm": (1, 1)},
        {"spacing_mm": float("nan")},
        {"upper_percentile": 0},
        {"centre": "brain"},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UserError):
        Preprocessing(**({"size": (64, 64, 64), "spacing_mm": 1.0} | wrong))


def test_a_scan_with_nothing_to_scale_is_refused():
    array = np.zeros((30, 30, 30), np.float32)
    array[3, 3, 3] = 1
    with pytest.raises(ScanError, match="nothing to scale"):
        preprocess(volume(array), Preprocessing((32, 32, 32), None))


def test_an_absurd_number_of_voxels_is_refused_before_it_is_allocated():
    with pytest.raises(ScanError, match="coarser"):
        preprocess(volume(ball()), Preprocessing((32, 32, 32), 0.001))


def test_crop_or_pad_far_outside_is_all_padding():
    box, inside = crop_or_pad(np.ones((4, 4, 4)), (10, -9, 0), (3, 3, 3))
    assert box.sum() == 0
    assert [s.stop - s.start for s in inside][:2] == [0, 0]


def test_real_heads_keep_their_foreground_at_2_mm(shared_data):
    from neuromf.data.volumes import load_volume

    for name in ("MNI152_T1_2mm", "chris_t1"):
        scan = load_volume(shared_data / "wholebrain" / f"{name}.nii.gz")
        prepared = preprocess(scan, Preprocessing((96, 112, 96), 2.0))
        assert prepared.record["foreground_lost"] == 0
        assert spacing_of(prepared.affine) == pytest.approx((2, 2, 2))
