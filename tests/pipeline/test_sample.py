from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import neuromf
from neuromf.errors import UserError
from neuromf.pipeline.decode import check_volume, decode
from neuromf.pipeline.sample import load_sample, newest_run, sample, sample_path


def contents(folder: Path, n: int) -> list[bytes]:
    return [sample_path(folder, i).read_bytes() for i in range(n)]


def latents_of(folder: Path, n: int) -> torch.Tensor:
    return torch.stack([load_sample(sample_path(folder, i))[1] for i in range(n)])


def test_sample_depends_on_seed_and_index_only(run: Path, tmp_path: Path) -> None:
    sample(str(run), 6, out=tmp_path / "a", batch_size=4)
    sample(str(run), 3, out=tmp_path / "b", batch_size=4)
    sample(str(run), 6, out=tmp_path / "c", batch_size=3)
    assert contents(tmp_path / "a", 3) == contents(tmp_path / "b", 3)
    a, c = latents_of(tmp_path / "a", 6), latents_of(tmp_path / "c", 6)
    assert (a - c).abs().max() <= 1e-5 * (a.max() - a.min())
    sample(str(run), 1, out=tmp_path / "d", seed=1)
    assert (latents_of(tmp_path / "d", 1) - a[:1]).abs().max() > 1e-3


def test_sampling_again_makes_only_what_is_missing(run: Path, tmp_path: Path) -> None:
    sample(str(run), 5, out=tmp_path / "g", batch_size=4)
    whole = contents(tmp_path / "g", 5)
    sample_path(tmp_path / "g", 2).unlink()
    report = sample(str(run), 5, out=tmp_path / "g", batch_size=4)
    assert report.made == 1
    assert contents(tmp_path / "g", 5) == whole
    assert sample(str(run), 7, out=tmp_path / "g", batch_size=4).made == 2
    assert json.loads((tmp_path / "g/manifest.json").read_text())["n"] == 7


def test_folder_of_other_samples_is_refused(run: Path, tmp_path: Path) -> None:
    sample(str(run), 2, out=tmp_path / "g")
    with pytest.raises(UserError, match="seed 0 there, 5 now"):
        sample(str(run), 2, out=tmp_path / "g", seed=5)
    with pytest.raises(UserError, match="nfe 1 there, 2 now"):
        sample(str(run), 2, out=tmp_path / "g", nfe=2)


def test_any_number_of_evaluations(run: Path, tmp_path: Path) -> None:
    for nfe in (1, 2, 5):
        sample(str(run), 1, out=tmp_path / str(nfe), nfe=nfe)
    one, two, five = (latents_of(tmp_path / str(nfe), 1) for nfe in (1, 2, 5))
    assert torch.isfinite(five).all()
    assert not torch.equal(one, two)
    with pytest.raises(UserError, match="at least one"):
        sample(str(run), 1, out=tmp_path / "0", nfe=0)


def test_newest_finished_run_is_the_default(run: Path, tmp_path: Path) -> None:
    assert newest_run(run.parent) == run
    with pytest.raises(UserError, match="no run in"):
        newest_run(tmp_path)
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "config.yaml").write_text("")
    with pytest.raises(UserError, match="is finished"):
        newest_run(tmp_path)


def test_unknown_average_lists_the_kept_ones(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no average 0\.9") as caught:
        sample(str(run), 1, out=tmp_path / "g", ema=0.9)
    assert "0.5" in caught.value.hint


def test_volumes_have_the_training_grid_and_say_they_are_synthetic(run: Path, tmp_path: Path) -> None:
    sample(str(run), 3, out=tmp_path / "g", decode=True, seed=4)
    image = nib.load(tmp_path / "g/volumes/sample_000001.nii.gz")
    assert image.shape == (16, 16, 16)
    assert image.get_data_dtype() == np.int16
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    assert np.allclose(image.header.get_zooms(), 12.0)
    sidecar = json.loads((tmp_path / "g/volumes/sample_000001.json").read_text())
    assert sidecar["SyntheticImage"] is True
    assert (sidecar["Seed"], sidecar["Index"], sidecar["NFE"]) == (4, 1, 1)
    assert len(sidecar["Model"]["weights_sha256"]) == 64
    direct = neuromf.load(str(run), device="cpu").sample(3, seed=4)[1, 0].numpy()
    assert np.abs(image.get_fdata() / 1000 - direct).max() <= 0.5 / 1000 + 1e-5 * np.ptp(direct)
    assert (tmp_path / "g/volumes/montage.png").exists()


def test_decoding_encoded_latents_gives_the_scans_back(latents: Path, heads: Path, tmp_path: Path) -> None:
    report = decode(latents, tmp_path / "back")
    assert report.n == report.made == 12
    name = sorted(path.name for path in heads.glob("*.nii.gz"))[0]
    real, back = (nib.load(folder / name).get_fdata() / 1000 for folder in (heads, tmp_path / "back"))
    scaled = (real - real.min()) / (np.percentile(real, 99.5) - real.min())
    assert np.abs(scaled - back).max() < 2e-3  # Haar is invertible; int16 rounds twice


def test_latents_of_another_autoencoder_are_refused(latents: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="these latents were made by"):
        decode(latents, tmp_path / "out", autoencoder="identity")
    assert not (tmp_path / "out").exists()


def test_export_holds_the_generator_alone(run: Path, tmp_path: Path) -> None:
    whole = neuromf.load(str(run), device="cpu")
    small = neuromf.load(str(whole.save_pretrained(tmp_path / "export")), device="cpu")
    assert torch.equal(whole.sample_latents([0, 1]), small.sample_latents([0, 1]))
    assert str(run.parent) not in (tmp_path / "export" / "data.json").read_text()


def test_load_says_what_it_did_not_find(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run at"):
        neuromf.load(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="neither a run nor an exported generator"):
        neuromf.load(str(tmp_path))


@pytest.mark.parametrize(
    ("volume", "complaint"),
    [
        (np.full((8, 8, 8), np.nan), "not finite"),
        (np.zeros((8, 8, 8)), "empty"),
        (np.linspace(0, 50, 512).reshape(8, 8, 8), "out of range"),
    ],
)
def test_quality_check_names_what_is_wrong(volume: np.ndarray, complaint: str) -> None:
    assert complaint in check_volume(volume.astype(np.float32))


def test_quality_check_passes_a_head(heads: Path) -> None:
    path = sorted(heads.glob("*.nii.gz"))[0]
    assert check_volume((nib.load(path).get_fdata() / 1000).astype(np.float32)) == ""
