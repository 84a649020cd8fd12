"""Real scans are cleaned as the training scans were: by the masks that were kept, or not at all."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from neuromf.data.latents import load_latent
from neuromf.data.volumes import save_volume
from neuromf.errors import UserError
from neuromf.files import read_json, write_json
from neuromf.pipeline.evaluate import EvaluateReport, evaluate
from neuromf.pipeline.evaluation_sets import held_back

# Everything brighter than 60 is brain.
STRIP = """\
import sys, nibabel as nib
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
image = nib.load(words["-i"])
nib.save(nib.Nifti1Image((image.get_fdata() > 60).astype("uint8"), image.affine), words["-m"])
"""


class _Autoencoder:
    name, sha256 = "pooling", "ab" * 32

    def check_size(self, size) -> None:
        pass

    def encode(self, volume):
        return SimpleNamespace(mean=torch.nn.functional.avg_pool3d(volume, 4))


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten heads, stripped by a program that is gone afterwards, and the latents of them; generated ones beside them."""
    from typer.testing import CliRunner

    from neuromf_cli.app import app

    folder = tmp_path_factory.mktemp("stripped")
    grid = np.stack(np.meshgrid(*[np.arange(20) - 9.5] * 3, indexing="ij"))
    reach = np.abs(grid).max(0)
    for n in range(10):
        noise = np.random.default_rng(n).normal(0, 2, (20, 20, 20))
        head = np.where(reach < 6.5, 100 + noise, np.where(reach < 8.5, 40 + noise, 0))
        save_volume(folder / f"scans/a{n}.nii.gz", head, np.diag([8.0, 8.0, 8.0, 1.0]))
        made = np.where(reach < 6.5, 0.9 + noise / 100, 0)
        save_volume(folder / f"made/s{n}.nii.gz", made, np.diag([8.0, 8.0, 8.0, 1.0]))
    program = folder / "programs/mri_synthstrip"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\n{STRIP}")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
        words = ("encode", str(folder / "scans"), "--out", str(folder / "latents"), "--size", "20", "--quiet")
        options = ("--autoencoder", "identity", "--skull-strip", "synthstrip", "--fractions", "0.5", "0.2", "0.3")
        done = CliRunner().invoke(app, [*words, *options])
        assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def encoded(once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of them, to be changed; nothing is drawn."""
    monkeypatch.setattr("neuromf.pipeline.evaluation_report._draw", lambda *_: [])
    return Path(shutil.copytree(once, tmp_path / "copy"))


def _evaluate(folder: Path, out: str) -> EvaluateReport:
    sets = held_back(folder / "scans", folder / "latents")
    return evaluate(
        folder / "made", sets.real, train=sets.train, preprocessing=sets.preprocessing, clean=sets.clean,
        autoencoder=_Autoencoder(), out=folder / out,
    )  # fmt: skip


def test_real_scans_are_what_was_encoded_without_the_program_that_stripped_them(encoded: Path, tmp_path: Path) -> None:
    sets = held_back(encoded / "scans", encoded / "latents")
    assert sets.clean is not None
    from neuromf.data.volume_sets import Grid, read_volume_set

    found = read_volume_set(
        sets.real, Grid((20, 20, 20), (8.0, 8.0, 8.0)), scratch=tmp_path, preprocessing=sets.preprocessing,
        clean=sets.clean,
    )  # fmt: skip
    assert not found.refused
    for volume, path in zip(found.array, sets.real, strict=True):
        latent = load_latent(encoded / "latents" / path.name.replace(".nii.gz", ".pt"))["z"]
        np.testing.assert_array_equal(volume, latent.numpy())  # the identity autoencoder's latent is the volume


def test_the_report_says_how_they_were_cleaned_and_it_matters(encoded: Path) -> None:
    report = _evaluate(encoded, "a")
    assert report.content["cleaning"] == {"skull_strip": {"method": "synthstrip", "program": "mri_synthstrip"}}
    sets = held_back(encoded / "scans", encoded / "latents")
    whole = evaluate(
        encoded / "made", sets.real, preprocessing=sets.preprocessing, autoencoder=_Autoencoder(), out=encoded / "b"
    )
    assert whole.content["cleaning"] is None
    names = ("intensity_wasserstein", "frechet_builtin")
    assert all(whole.metrics[name]["value"] > 1.5 * report.metrics[name]["value"] for name in names)


def test_a_scan_whose_mask_is_gone_is_refused_by_name_and_not_compared_unstripped(encoded: Path) -> None:
    lost = held_back(encoded / "scans", encoded / "latents").real[0]
    (encoded / "latents/masks" / lost.name).unlink()
    report = _evaluate(encoded, "a")
    (refused,) = report.refused
    assert Path(refused["path"]) == lost
    assert "brain mask is not among those" in refused["reason"]
    assert "mri_synthstrip" in refused["reason"]
    for mask in (encoded / "latents/masks").iterdir():
        mask.unlink()
    with pytest.raises(UserError, match=r"none of the .* volumes can be used"):
        _evaluate(encoded, "b")


def test_a_mask_of_another_file_of_that_name_is_not_used(encoded: Path) -> None:
    changed = held_back(encoded / "scans", encoded / "latents").real[0]
    save_volume(changed, np.random.default_rng(0).random((20, 20, 20)) * 100, np.diag([8.0, 8.0, 8.0, 1.0]))
    assert [Path(entry["path"]) for entry in _evaluate(encoded, "a").refused] == [changed]


def test_an_unknown_step_or_n4_without_simpleitk_is_refused_before_anything_is_read(
    encoded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = read_json(encoded / "latents/dataset.json")
    write_json(encoded / "latents/dataset.json", dataset | {"cleaning": {"denoise": {"method": "nlm"}}})
    with pytest.raises(UserError, match="cleaned by denoise, which this version does not know"):
        held_back(encoded / "scans", encoded / "latents")
    bias = {"method": "n4", "simpleitk": "2.5", "iterations": [50], "convergence": 1e-3, "working_mm": 4.0}
    write_json(encoded / "latents/dataset.json", dataset | {"cleaning": {"bias_field": bias}})
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(UserError, match="SimpleITK"):
        held_back(encoded / "scans", encoded / "latents")
