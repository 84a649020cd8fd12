"""Skull stripping by programs that are not here: small scripts stand for them, and for their failures."""

from __future__ import annotations

import os
import pickle
import stat
import sys
from pathlib import Path

import numpy as np
import pytest

from neuromf.data.volumes import Volume
from neuromf.errors import ScanError, UserError
from neuromf.pipeline.skull_strip import brain_ml, skull_stripper, stripped

# What both programs do here: everything brighter than 50 is brain; HD-BET writes the image, SynthStrip the mask.
STRIP = """\
import sys, nibabel as nib, numpy as np
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
image = nib.load(words["-i"])
array = image.get_fdata()
brain = array > 50
if "-m" in words:
    nib.save(nib.Nifti1Image(brain.astype(np.uint8), image.affine), words["-m"])
else:
    nib.save(nib.Nifti1Image(np.where(brain, array, 0), image.affine), words["-o"])
"""


@pytest.fixture
def path_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")
    return folder


def install(folder: Path, name: str, code: str) -> None:
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{code}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def scan() -> Volume:
    grid = np.stack(np.meshgrid(*[np.arange(n) - n / 2 for n in (16, 18, 14)], indexing="ij"))
    radius = np.sqrt((grid**2).sum(0))
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    affine[:3, 3] = (-10, 4, 7)
    array = np.where(radius < 5, 100, np.where(radius < 7, 20, 0)).astype(np.float32) - 3
    array[8, 9, 7] = 0  # a dark voxel within the brain
    return Volume(array, affine, {})


def brain_of(scan: Volume) -> np.ndarray:
    brain = scan.array > 50
    brain[8, 9, 7] = True
    return brain


@pytest.mark.parametrize(("method", "program"), [("synthstrip", "mri_synthstrip"), ("hd-bet", "hd-bet")])
def test_a_program_on_the_path_gives_the_mask(method: str, program: str, path_folder: Path, scan: Volume) -> None:
    install(path_folder, program, STRIP)
    stripper = skull_stripper(method)
    assert stripper is not None
    assert stripper.identity == {"method": method, "program": program}
    mask = stripper.mask(scan)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, brain_of(scan))


def test_none_strips_nothing() -> None:
    assert skull_stripper("none") is None


def test_a_missing_program_is_said_before_any_work_with_what_else_there_is(path_folder: Path) -> None:
    install(path_folder, "hd-bet", STRIP)
    with pytest.raises(UserError, match="mri_synthstrip, which is not on the path") as caught:
        skull_stripper("synthstrip")
    assert "--skull-strip hd-bet or --skull-strip mindgrab" in caught.value.hint


def test_missing_weights_are_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUROMF_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError, match="'mindgrab' are not on this machine"):
        skull_stripper("mindgrab")


def test_an_unknown_method_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="did you mean 'synthstrip'"):
        skull_stripper("sythstrip")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; print('loading', file=sys.stderr); sys.exit('no CUDA here')", "status 1: loading / no CUDA here"),
        ("import os; os.kill(os.getpid(), 9)", "status -9: it said nothing"),
        ("", "its result is missing or on another grid"),
        (STRIP.replace("brain = array > 50", "array = array[1:]; brain = array > 50"), "missing or on another grid"),
        (
            STRIP + "open(words['-m'], 'wb').write(b'damaged')",
            "missing or on another grid",
        ),
    ],
)
def test_a_program_that_fails_refuses_the_scan_and_says_why(
    code: str, said: str, path_folder: Path, scan: Volume
) -> None:
    install(path_folder, "mri_synthstrip", code)
    stripper = skull_stripper("synthstrip")
    assert stripper is not None
    with pytest.raises(ScanError) as caught:
        stripper.mask(scan)
    assert said in caught.value.message


def test_nothing_is_left_in_the_temporary_folder(
    path_folder: Path, scan: Volume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    install(path_folder, "mri_synthstrip", "import sys; sys.exit(1)")
    stripper = skull_stripper("synthstrip")
    assert stripper is not None
    with pytest.raises(ScanError):
        stripper.mask(scan)
    assert not list(place.iterdir())


def test_another_process_gets_the_name_of_the_network_and_not_its_weights(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEUROMF_WEIGHTS", str(shared_data / "weights"))
    stripper = skull_stripper("mindgrab")
    assert stripper is not None
    assert stripper.identity["weights"]["name"] == "mindgrab"
    assert len(stripper.identity["weights"]["sha256"]) == 64
    sent = pickle.dumps(stripper)
    assert len(sent) < 10_000
    assert pickle.loads(sent).identity == stripper.identity


def test_outside_the_brain_is_the_scans_own_minimum(scan: Volume) -> None:
    brain = brain_of(scan)
    result = stripped(scan, brain)
    np.testing.assert_array_equal(result.array[brain], scan.array[brain])
    assert (result.array[~brain] == -3).all()
    assert result.array.dtype == np.float32


def test_the_volume_of_a_mask_is_in_millilitres(scan: Volume) -> None:
    mask = np.zeros((10, 10, 10), dtype=bool)
    mask[:5] = True
    assert brain_ml(mask, scan.affine) == pytest.approx(500 * 12 / 1000)
