"""N4: a known field is found and divided out, and its record brings it back on any grid."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import numpy as np
import pytest

from neuromf.data.bias_field import BiasCorrection, _at_knots, correct_bias, field_on
from neuromf.data.preprocessing import Preprocessing, head_mask, preprocess
from neuromf.data.restoration import restore_intensity
from neuromf.data.volumes import Volume
from neuromf.errors import UserError

needs_simpleitk = pytest.mark.skipif(
    find_spec("SimpleITK") is None, reason="SimpleITK is not installed (pip install 'neuromf[prep]')"
)
SHAPE, SPACING_MM = (40, 44, 36), (4.0, 4.0, 5.0)


def affine_of(spacing: tuple[float, float, float]) -> np.ndarray:
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = (-80, -90, 30)
    return affine


def smooth_field(shape: tuple[int, int, int]) -> np.ndarray:
    """From about 0.6 to 1.6, brighter to the front and the top."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    return np.exp(0.35 * y + 0.15 * z * z - 0.1 * x * y)


def distance() -> np.ndarray:
    """From the middle of the scan: 0 there, 1 at the middle of each face."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij"))
    return np.sqrt((grid**2).sum(0))


def head(offset: float = 0.0) -> tuple[Volume, np.ndarray, np.ndarray]:
    """A ball of three tissues with noise under a field: (what a scanner gives, its ball, the field)."""
    radius = distance()
    tissue = np.where(radius < 0.5, 300, np.where(radius < 0.7, 200, np.where(radius < 0.85, 100, 0)))
    noise = np.random.default_rng(1).normal(0, 4, SHAPE) * (radius < 0.85)
    field = smooth_field(SHAPE)
    array = ((tissue + noise) * field + offset).astype(np.float32)
    return Volume(array, affine_of(SPACING_MM), {"orientation": "RAS"}), radius < 0.85, field


def record_of(field: np.ndarray) -> dict[str, object]:
    """What `correct_bias` would keep of a field of `SHAPE`."""
    return {
        "log_field": _at_knots(np.log(field)).tolist(),
        "shape": list(field.shape),
        "affine": affine_of(SPACING_MM).tolist(),
        "lower": 0.0,
    }


def test_without_simpleitk_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(UserError, match=r"neuromf\[prep\]"):
        _ = BiasCorrection().identity


def test_the_record_holds_the_field_well_enough_on_the_scans_grid_and_on_a_finer_one() -> None:
    field = smooth_field(SHAPE)
    record = record_of(field)
    same = field_on(record, SHAPE, affine_of(SPACING_MM))
    inner = (slice(2, -2),) * 3
    assert np.abs(same / field - 1)[inner].max() < 0.015
    finer = field_on(record, (79, 87, 71), affine_of((2.0, 2.0, 2.5)))
    assert np.abs(finer[::2, ::2, ::2] / field - 1)[inner].max() < 0.015


def test_what_preprocessing_scaled_gets_its_field_and_intensities_back() -> None:
    volume, _, field = head()
    corrected = volume._replace(array=(volume.array / field).astype(np.float32))
    source = {"orientation_from": "sform"}
    prepared = preprocess(corrected._replace(source=source), Preprocessing((40, 44, 36), None))
    record = prepared.record | {"bias_field": record_of(field)}
    restored = restore_intensity(prepared.array, record)[0]
    assert np.abs(restored - volume.array).max() < 0.01 * volume.array.max()
    plain = restore_intensity(prepared.array, prepared.record)[0]
    assert np.abs(plain - corrected.array).max() < 1e-3


@needs_simpleitk
@pytest.mark.parametrize("offset", [0.0, -50.0])
def test_n4_evens_out_a_known_field_and_keeps_brightness(offset: float) -> None:
    volume, inside, _ = head(offset)
    corrected, record = correct_bias(volume, head_mask(volume.array), BiasCorrection(working_mm=8))
    core = distance() < 0.45  # one tissue
    before, after = volume.array[core] - offset, corrected.array[core] - offset
    assert after.std() / after.mean() < 0.4 * before.std() / before.mean()
    assert after.mean() == pytest.approx(before.mean(), rel=0.25)
    assert corrected.array.min() == pytest.approx(offset)
    assert record["field_p99"] > 1.2 > 0.9 > record["field_p1"]
    again = record["lower"] + (corrected.array - record["lower"]) * field_on(record, SHAPE, volume.affine)
    assert np.abs(again - volume.array)[inside].max() < 0.02 * np.ptp(volume.array)
    assert np.log(field_on(record, SHAPE, volume.affine))[head_mask(volume.array)].mean() == pytest.approx(0, abs=5e-3)


@needs_simpleitk
def test_settings_and_version_are_recorded() -> None:
    import SimpleITK

    volume, inside, _ = head()
    _, record = correct_bias(volume, inside, BiasCorrection(iterations=(5, 5), working_mm=8))
    assert record["iterations"] == [5, 5]
    assert record["shrink"] == [2, 2, 2]
    assert record["simpleitk"] == SimpleITK.Version_VersionString()
