from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from neuromf.data.augmentation import Augmentation, Augmenter, Change, tone_curve
from neuromf.data.preprocessing import Preprocessing, preprocess
from neuromf.data.volumes import Volume
from neuromf.errors import UserError

SHAPE = (40, 44, 48)
AFFINE = np.diag([1.0, 1.2, 0.9, 1.0])
MARKERS = [(12, 14, 30), (27, 30, 16), (20, 33, 36)]


def markers(points=MARKERS) -> np.ndarray:
    """One Gaussian of 1.5 voxels for each point, dim to bright, so that each can be found again."""
    grid = np.indices(SHAPE)
    total = np.zeros(SHAPE)
    for n, point in enumerate(points, start=1):
        squared = ((grid - np.reshape(point, (3, 1, 1, 1))) ** 2).sum(0)
        total += n * np.exp(-0.5 * squared / 1.5**2)
    return total.astype(np.float32)


def augmenter(array: np.ndarray, **spec) -> Augmenter:
    volume = Volume(array, AFFINE, {})
    spec = {"size": SHAPE, "spacing_mm": None, "centre": "grid"} | spec
    return Augmenter(volume, preprocess(volume, Preprocessing(**spec)))


def texture() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (100 * rng.gamma(2.0, 1.0, SHAPE)).astype(np.float32)


def centroid_near(array: np.ndarray, point: np.ndarray, reach: int = 5) -> np.ndarray:
    start = np.rint(point).astype(int) - reach
    part = array[tuple(slice(s, s + 2 * reach + 1) for s in start)]
    return start + (np.indices(part.shape) * part).sum((1, 2, 3)) / part.sum()


# geometry


def test_markers_land_where_the_rotation_and_the_stretch_say():
    change = Change(rotation_deg=(6.0, -9.0, 12.0), scale=(1.06, 0.95, 1.02))
    copy = augmenter(markers()).copy(change)[0]
    rotation = Rotation.from_euler("xyz", change.rotation_deg, degrees=True).as_matrix()
    spacing, middle = np.diag(AFFINE)[:3], (np.array(SHAPE) - 1) / 2
    for point in MARKERS:
        offset_mm = (np.array(point) - middle) * spacing
        expected = middle + rotation @ (change.scale * offset_mm) / spacing
        assert np.linalg.norm(expected - point) > 1.5
        assert np.abs(centroid_near(copy, expected) - expected).max() < 0.05


@pytest.mark.parametrize("spacing_mm", [1.0, 2.0, 0.8])
def test_a_resampled_copy_puts_markers_where_a_copy_of_the_resampled_volume_would(spacing_mm):
    change = Change(rotation_deg=(0.0, 0.0, 2.0), scale=(1.0, 1.02, 1.0))
    volume = Volume(markers(), AFFINE, {})
    prepared = preprocess(volume, Preprocessing((72, 72, 72), spacing_mm))
    copy = Augmenter(volume, prepared).copy(change)[0]
    middle, angle = np.array([35.5] * 3), np.deg2rad(2)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    for point in MARKERS:
        world = AFFINE @ [*point, 1]
        before = (np.linalg.inv(prepared.affine) @ world)[:3]
        expected = middle + turn @ ([1.0, 1.02, 1.0] * (before - middle))
        assert np.abs(centroid_near(copy, expected, round(5 / spacing_mm)) - expected).max() < 0.1


def test_a_positive_turn_about_the_vertical_axis_moves_the_right_side_to_the_front():
    middle = (np.array(SHAPE) - 1) / 2
    right = middle + [12, 0, 0]
    copy = augmenter(markers([right])).copy(Change(rotation_deg=(0, 0, 10.0)))[0]
    found = centroid_near(copy, middle + [11.8, 12 * np.tan(np.deg2rad(10)) / 1.2, 0])
    assert found[1] > middle[1] + 1
    assert found[2] == pytest.approx(middle[2], abs=0.02)


@pytest.mark.parametrize("spec", [{}, {"spacing_mm": 1.5}, {"size": (48, 48, 52)}, {"size": (32, 32, 32)}])
def test_no_change_gives_the_volume_bit_for_bit(spec):
    one = augmenter(texture(), **spec)
    assert np.array_equal(one.copy(Change()), one._prepared.array)


@pytest.mark.parametrize(
    "spec", [{}, {"size": (48, 48, 52)}, {"size": (32, 32, 32)}, {"spacing_mm": 1.5}, {"spacing_mm": 0.8}]
)
def test_a_tiny_turn_gives_the_volume_back_up_to_its_edges(spec):
    one = augmenter(texture(), **spec)
    assert np.abs(one.copy(Change(rotation_deg=(0, 0, 1e-7))) - one._prepared.array).max() < 1e-4


def test_a_flip_is_exact_and_comes_last():
    one = augmenter(texture())
    assert np.array_equal(one.copy(Change(flip=True)), one._prepared.array[:, ::-1])
    moved = Change(rotation_deg=(1.0, 2.0, -1.0), scale=(1.01, 1.0, 0.99), gain=1.02)
    assert np.array_equal(one.copy(moved._replace(flip=True)), one.copy(moved)[:, ::-1])


def test_a_copy_looks_beyond_the_crop_into_the_scan():
    array = np.zeros(SHAPE, np.float32)
    array[:, :, 6:] = 1.0  # the box of the middle holds one dark voxel
    array[18, 20, 22] = 0.0
    whole = augmenter(array, size=(16, 16, 28)).copy(Change(scale=(1.0, 1.0, 0.7)))[0]
    assert whole[8, 8, 0] < 0.1
    assert whole[8, 8, 14] > 0.9


def test_padding_stays_zero_and_the_scans_edge_is_repeated():
    bright = texture() + 500
    one = augmenter(bright, size=(56, 44, 48))
    copy = one.copy(Change(rotation_deg=(0, 0, 3.0), scale=(0.97, 0.97, 0.97), gain=1.05, offset=0.05))[0]
    assert (copy[:8] == 0).all()
    assert (copy[-8:] == 0).all()
    assert copy[8:-8].min() >= 0
    assert np.median(copy[8]) > 0.3  # p0 of this scan is 0.0, its edges are not


def test_a_cubic_copy_stays_between_the_darkest_and_the_brightest_voxel():
    array = np.zeros(SHAPE, np.float32)
    array[10:30, 10:30, 10:30] = 100.0
    copy = augmenter(array).copy(Change(rotation_deg=(1.3, 0.7, -2.0), scale=(1.01, 0.99, 1.0)))
    assert copy.min() == 0
    assert copy.max() == pytest.approx(1, abs=1e-5)


def test_a_copy_keeps_the_texture_that_trilinear_interpolation_would_blur():
    array = texture()
    one = augmenter(array)
    copy = one.copy(Change(rotation_deg=(2.0, -2.0, 2.0)))
    inner = (slice(None), *(slice(8, -8),) * 3)
    assert copy[inner].std() > 0.8 * one._prepared.array[inner].std()  # white noise, the hardest case; trilinear: 0.56


# intensity


def test_the_tone_curve_stays_within_its_bounds_and_keeps_order_and_zero():
    values = np.linspace(0, 1.5, 301, dtype=np.float32)
    for gain in (0.95, 1.05):
        for offset in (-0.05, 0.05):
            for gamma in (0.95, 1.05):
                out = tone_curve(values, Change(gain=gain, offset=offset, gamma=gamma))
                assert out[0] == 0
                assert (np.diff(out) > 0).all()
                assert (np.abs(out - values) <= 0.05 * values**gamma + 0.05 + 0.05 * 1.5 * np.log(1.5) + 0.02).all()
    assert tone_curve(np.float32([0.5]), Change(gain=1.04, offset=-0.03))[0] == pytest.approx(0.49)
    assert tone_curve(np.float32([0.5]), Change(gamma=1.05))[0] == pytest.approx(0.5**1.05)
    assert tone_curve(np.float32([0.05]), Change(offset=0.04))[0] == pytest.approx(0.07)


def test_intensities_above_one_are_kept_unless_the_preprocessing_clips():
    change = Change(gain=1.05)
    kept, clipped = (augmenter(texture(), clip_intensity=clip).copy(change) for clip in (False, True))
    assert kept.max() > 1.05
    assert clipped.max() == 1


# draws


def test_draws_depend_on_seed_subject_and_copy_alone():
    settings = Augmentation()
    first = settings.draw("sub-01", 1)
    assert first == Augmentation().draw("sub-01", 1)
    others = [settings.draw("sub-01", 2), settings.draw("sub-02", 1), Augmentation(seed=1).draw("sub-01", 1)]
    assert len({first, *others}) == 4
    still = Augmentation(rotation_deg=0).draw("sub-01", 1)
    assert still == first._replace(rotation_deg=(0.0, 0.0, 0.0))


def test_draws_fill_their_ranges_and_never_leave_them():
    drawn = [Augmentation().draw(f"s{n}", 1) for n in range(2000)]
    assert np.mean([change.flip for change in drawn]) == pytest.approx(0.5, abs=0.04)
    for name, middle, reach in (
        ("rotation_deg", 0, 2),
        ("scale", 1, 0.02),
        ("gain", 1, 0.05),
        ("offset", 0, 0.05),
        ("gamma", 1, 0.05),
    ):
        values = (np.array([getattr(change, name) for change in drawn]) - middle) / reach
        assert np.abs(values).max() <= 1 + 1e-12
        assert np.abs(values).max() > 0.99
        assert np.abs(values.mean(0)).max() < 0.05
        np.testing.assert_allclose(values.std(0), 3**-0.5, atol=0.03)


def test_no_strength_is_no_change():
    still = Augmentation(flip=0, intensity=0, rotation_deg=0, scale=0)
    assert all(still.draw(f"s{n}", 1) == Change() for n in range(20))


def test_settings_are_read_from_words_and_wrong_ones_named():
    assert Augmentation(seed=3).changed({"flip": "0", "scale": "0.1"}) == Augmentation(0.0, 0.05, 2.0, 0.1, 3)
    with pytest.raises(UserError, match=r"(?s)no augmentation 'rotation'.*rotation_deg"):
        Augmentation().changed({"rotation": "2"})
    with pytest.raises(UserError, match=r"flip=half is no number"):
        Augmentation().changed({"flip": "half"})
    for words in ({"rotation_deg": "-1"}, {"intensity": "5"}, {"scale": "nan"}, {"flip": "2"}):
        with pytest.raises(UserError, match=r"(?s)cannot be used.*a number from 0"):
            Augmentation().changed(words)
