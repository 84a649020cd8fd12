"""Encoding stripped scans: what was done travels with the latent, and another way of doing it is not mixed in."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuromf.data.latents import load_latent
from neuromf.data.preprocessing import Preprocessing
from neuromf.data.volumes import Volume, save_volume
from neuromf.errors import UserError
from neuromf.files import read_json
from neuromf.models.autoencoder import load_autoencoder
from neuromf.pipeline.cleaning import Cleaning
from neuromf.pipeline.encode import encode
from neuromf.pipeline.encode_report import EncodeReport

# Everything brighter than 60 is brain.
STRIP = """\
import sys, nibabel as nib
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
image = nib.load(words["-i"])
nib.save(nib.Nifti1Image((image.get_fdata() > 60).astype("uint8"), image.affine), words["-m"])
"""


class Level:
    """Calls what is brighter than a level brain."""

    def __init__(self, level: float = 60) -> None:
        self.identity: dict[str, Any] = {"method": "level", "level": level}
        self.asked = 0

    def mask(self, volume: Volume) -> np.ndarray:
        self.asked += 1
        return volume.array > self.identity["level"]


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Four heads of 8 mm voxels: a bright brain of 885 ml (of a4: 111 ml) in a dim head."""
    grid = np.stack(np.meshgrid(*[np.arange(20) - 9.5] * 3, indexing="ij"))
    for n in range(1, 5):
        noise = np.random.default_rng(n).normal(0, 2, (20, 20, 20))
        reach = np.abs(grid).max(0)
        brain = reach < (6.5 if n < 4 else 2.6)
        array = np.where(brain, 100 + noise, np.where(reach < 8.5, 40 + noise, 0))
        save_volume(tmp_path / f"scans/a{n}.nii.gz", array, np.diag([8.0, 8.0, 8.0, 1.0]))
    return tmp_path / "scans"


def run(scans: Path, out: Path, cleaning: Cleaning | None = None, **options: Any) -> EncodeReport:
    identity = load_autoencoder("identity", device="cpu")
    spec = Preprocessing((20, 20, 20), None)
    return encode([scans], out, autoencoder=identity, preprocessing=spec, cleaning=cleaning, **options)


def test_what_is_not_brain_is_gone_and_the_latent_says_how(scans: Path, tmp_path: Path) -> None:
    report = run(scans, tmp_path / "out", Cleaning(Level()))
    assert report.encoded == 4
    record = load_latent(tmp_path / "out/a1.pt")["metadata"]["preprocessing"]
    assert record["skull_strip"]["method"] == "level"
    # 12^3 voxels of 0.512 ml
    assert record["skull_strip"]["brain_ml"] == pytest.approx(12**3 * 0.512, abs=0.1)
    assert read_json(tmp_path / "out/dataset.json")["cleaning"] == {"skull_strip": {"method": "level", "level": 60}}
    run(scans, tmp_path / "whole")
    stripped, whole = (load_latent(tmp_path / folder / "a1.pt")["z"] for folder in ("out", "whole"))
    assert (stripped > 0.1).float().mean() < 0.6 * (whole > 0.1).float().mean()


def test_a_brain_of_impossible_size_is_reported(scans: Path, tmp_path: Path) -> None:
    notes = {scan.subject: " ".join(scan.notes) for scan in run(scans, tmp_path / "out", Cleaning(Level())).scans}
    assert "suspicious: the brain found measures 111 ml" in notes["a4"]
    assert "suspicious" not in notes["a1"]


def test_the_same_command_again_and_copies_strip_nothing_twice(scans: Path, tmp_path: Path) -> None:
    stripper = Level()
    run(scans, tmp_path / "out", Cleaning(stripper))
    again = run(scans, tmp_path / "out", Cleaning(stripper), flip_copies=True)
    assert (again.kept, stripper.asked) == (4, 4)
    assert again.copies is not None
    assert again.copies.encoded > 0


@pytest.mark.parametrize("other", [Cleaning(), Cleaning(Level(level=30))])
def test_a_folder_of_other_cleaning_is_refused(scans: Path, tmp_path: Path, other: Cleaning) -> None:
    run(scans, tmp_path / "out", Cleaning(Level()))
    with pytest.raises(UserError, match="latents of other settings: cleaning"):
        run(scans, tmp_path / "out", other)


def test_a_folder_made_before_there_was_cleaning_goes_on(scans: Path, tmp_path: Path) -> None:
    run(scans, tmp_path / "out")
    assert run(scans, tmp_path / "out").kept == 4
    with pytest.raises(UserError, match="cleaning is None there"):
        run(scans, tmp_path / "out", Cleaning(Level()))


def test_a_scan_without_a_brain_is_refused_and_the_rest_is_encoded(scans: Path, tmp_path: Path) -> None:
    save_volume(scans / "b.nii.gz", np.random.default_rng(0).random((20, 20, 20)), np.diag([8.0, 8.0, 8.0, 1.0]))
    report = run(scans, tmp_path / "out", Cleaning(Level()))
    (refused,) = [scan for scan in report.scans if scan.status == "refused"]
    assert (refused.subject, report.encoded) == ("b", 4)
    assert "no brain was found" in refused.reason


def test_the_command_strips_by_a_program_and_keeps_masks(
    neuromf: Callable[..., Any], scans: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = in_tmp / "programs/mri_synthstrip"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\n{STRIP}")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    words = ("encode", scans, "--out", "out", "--size", "20", "--autoencoder", "identity", "--quiet")
    done = neuromf(*words, "--skull-strip", "synthstrip", "--intensity", "foreground")
    assert done.exit_code == 0, done.stderr
    assert sorted(path.name for path in Path("out/masks").iterdir()) == [f"a{n}.nii.gz" for n in range(1, 5)]
    record = load_latent(Path("out/a1.pt"))["metadata"]["preprocessing"]
    assert record["skull_strip"]["program"] == "mri_synthstrip"
    assert record["settings"]["intensity"] == "foreground"


def test_a_missing_program_or_package_is_told_before_anything_is_written(
    neuromf: Callable[..., Any], scans: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(in_tmp))
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    for words, said in ((("--skull-strip", "hd-bet"), "hd-bet"), (("--n4",), "SimpleITK")):
        for check in ((), ("--check",)):
            failed = neuromf("encode", scans, "--out", "out", "--size", "20", *words, *check)
            assert failed.exit_code == 2
            assert said in failed.stderr
    assert not Path("out").exists()
