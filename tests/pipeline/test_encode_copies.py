from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from neuromf.data.augmentation import Augmentation, Augmenter
from neuromf.data.latents import LatentDataset, load_latent, load_latent_folder_info
from neuromf.data.preprocessing import Preprocessing, preprocess
from neuromf.data.volumes import load_volume
from neuromf.errors import ScanError, UserError
from neuromf.files import read_json
from neuromf.models.autoencoder import HaarAutoencoder, Posterior
from neuromf.pipeline.encode import encode

SPEC = Preprocessing((16, 16, 16), spacing_mm=1.2)


class Counting(HaarAutoencoder):
    """The Haar wavelet, with a count of encoded volumes, which stops or fails at one of them if told to."""

    def __init__(self, stop_at: int | None = None, broken_at: int | None = None) -> None:
        super().__init__("haar", 1)
        self.calls, self.stop_at, self.broken_at = 0, stop_at, broken_at

    def encode(self, volume):
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        self.calls += 1
        mean, log_sigma = super().encode(volume)
        return Posterior(mean * (torch.nan if self.calls - 1 == self.broken_at else 1), log_sigma)


@pytest.fixture
def scans(tmp_path) -> Path:
    """Six scans; four of them are for training."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for i in range(6):
        array = np.random.default_rng(i).gamma(2, 50, (15, 16, 18)).astype(np.float32)
        nib.save(nib.Nifti1Image(array, np.diag([-1, 1, 1.1, 1])), folder / f"s{i}.nii.gz")
    return folder


def run(scans, out, autoencoder=None, **options):
    return encode([str(scans)], out, autoencoder=autoencoder or Counting(), preprocessing=SPEC, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "encode_report.json"
    }


def test_copies_are_made_of_the_training_scans_alone(scans, tmp_path):
    report = run(scans, tmp_path / "out", flip_copies=True, copies=2)
    info = load_latent_folder_info(tmp_path / "out")
    assert len(info.splits["train"]) == 4
    for kind in ("flipped", "copies/1", "copies/2"):
        assert sorted(path.stem for path in (tmp_path / "out" / kind).iterdir()) == info.splits["train"]
    assert (report.copies.scans, report.copies.of_each, report.copies.encoded, report.copies.kept) == (4, 3, 12, 0)
    assert "copies: 3 of each of 4 training scans: 12 encoded" in report.lines()
    assert read_json(tmp_path / "out" / "encode_report.json")["copies"]["encoded"] == 12
    assert (info.dataset["flip_copies"], info.dataset["copies"]) == (True, 2)
    assert info.dataset["augmentation"] == Augmentation().to_dict()
    assert len(LatentDataset(tmp_path / "out", copies=True)) == 16


def test_a_copy_is_encoded_from_the_augmented_scan_and_says_how(scans, tmp_path):
    report = run(scans, tmp_path / "out", flip_copies=True, copies=2, seed=5)
    subject = report.splits["train"][1]
    volume = load_volume(scans / f"{subject}.nii.gz")
    prepared = preprocess(volume, SPEC)
    change = Augmentation(seed=5).draw(subject, 2)
    augmented = torch.from_numpy(Augmenter(volume, prepared).copy(change))[None]
    copy = load_latent(tmp_path / "out" / "copies" / "2" / f"{subject}.pt")
    assert torch.equal(copy["z"], Counting().encode(augmented).mean[0])
    assert copy["metadata"]["augmentation"] == {
        "copy": "copies/2",
        "settings": Augmentation(seed=5).to_dict(),
        "change": change.to_dict(),
    }
    flipped = load_latent(tmp_path / "out" / "flipped" / f"{subject}.pt")
    mirrored = torch.from_numpy(prepared.array)[None].flip(2)
    assert torch.equal(flipped["z"], Counting().encode(mirrored).mean[0])
    assert (flipped["metadata"]["flipped"], flipped["metadata"]["augmentation"]) == (True, None)
    assert load_latent(tmp_path / "out" / f"{subject}.pt")["metadata"]["flipped"] is False


def test_whitening_does_not_depend_on_copies(scans, tmp_path):
    without, with_copies = run(scans, tmp_path / "a"), run(scans, tmp_path / "b", copies=2)
    assert with_copies.statistics == without.statistics


def test_more_copies_are_added_to_those_that_are_there(scans, tmp_path):
    out = tmp_path / "out"
    run(scans, out, copies=1)
    autoencoder = Counting()
    report = run(scans, out, autoencoder, copies=3)
    assert (report.kept, report.copies.kept, report.copies.encoded) == (6, 4, 8)
    assert autoencoder.calls == 8  # the effect on latents is known already
    assert files(out) == files(run(scans, tmp_path / "straight", copies=3).out)


def test_the_same_command_again_does_no_work_and_changes_no_byte(scans, tmp_path):
    run(scans, tmp_path / "out", copies=2, flip_copies=True)
    before, autoencoder = files(tmp_path / "out"), Counting()
    again = run(scans, tmp_path / "out", autoencoder, copies=2, flip_copies=True)
    assert (again.copies.kept, autoencoder.calls) == (12, 0)
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("stop_at", [6, 9, 13])
def test_copies_that_were_stopped_are_finished_by_the_same_command(scans, tmp_path, stop_at):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(scans, out, Counting(stop_at), copies=2)
    assert len(list(out.rglob("*.pt"))) == stop_at
    with pytest.raises(UserError, match="not finished"):
        load_latent_folder_info(out)
    (out / "copies" / "1").mkdir(parents=True, exist_ok=True)
    (out / "copies" / "1" / ".partial-x.pt").write_bytes(b"left by a kill")
    report = run(scans, out, copies=2)
    assert report.copies.encoded == 14 - stop_at
    assert files(out) == files(run(scans, tmp_path / "straight", copies=2).out)


def test_copies_of_a_stopped_command_are_not_mixed_with_those_of_other_settings(scans, tmp_path):
    out, other = tmp_path / "out", {"copies": 1, "augmentation": Augmentation(rotation_deg=5)}
    with pytest.raises(KeyboardInterrupt):
        run(scans, out, Counting(stop_at=9), copies=1)
    assert run(scans, out, **other).copies.encoded == 4
    assert files(out) == files(run(scans, tmp_path / "straight", **other).out)


def test_a_damaged_copy_and_copies_of_a_changed_scan_are_made_again(scans, tmp_path):
    out = tmp_path / "out"
    first, second, *_ = run(scans, out, copies=2).splits["train"]
    (out / "copies" / "2" / f"{first}.pt").write_bytes(b"damaged")
    array = np.random.default_rng(77).gamma(2, 50, (15, 16, 18)).astype(np.float32)
    nib.save(nib.Nifti1Image(array, np.diag([-1, 1, 1.1, 1])), scans / f"{second}.nii.gz")
    assert run(scans, out, copies=2).copies.encoded == 3
    assert files(out) == files(run(scans, tmp_path / "straight", copies=2).out)


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"augmentation": Augmentation(rotation_deg=5)}, "augmentation.rotation_deg is 2.0 there and 5 here"),
        ({"seed": 1}, "augmentation.seed is 0 there and 1 here"),
    ],
)
def test_copies_of_other_settings_are_refused_and_nothing_is_touched(scans, tmp_path, change, phrase):
    run(scans, tmp_path / "out", copies=1)
    before = files(tmp_path / "out")
    with pytest.raises(UserError, match=phrase) as caught:
        run(scans, tmp_path / "out", copies=2, **change)
    assert "another --out" in caught.value.hint
    assert files(tmp_path / "out") == before


def test_an_augmentation_without_copies_is_refused_before_any_work(scans, tmp_path):
    with pytest.raises(UserError, match="no copies are asked for") as caught:
        run(scans, tmp_path / "out", augmentation=Augmentation(flip=0))
    assert "--copies" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_copies_that_are_not_asked_for_any_more_are_not_trained_on_and_said_so(scans, tmp_path):
    run(scans, tmp_path / "out", copies=2, flip_copies=True)
    report = run(scans, tmp_path / "out", copies=1)
    assert any("lie unused in flipped, copies/2" in line for line in report.lines())
    assert len(LatentDataset(tmp_path / "out", copies=True)) == 8


def test_a_dry_run_counts_the_copies_and_writes_none(scans, tmp_path):
    planned = run(scans, tmp_path / "out", copies=3, dry_run=True).copies
    assert (planned.scans, planned.of_each, planned.planned) == (4, 3, 12)
    assert not (tmp_path / "out").exists()
    run(scans, tmp_path / "out", copies=1)
    planned = run(scans, tmp_path / "out", copies=3, dry_run=True)
    assert (planned.copies.kept, planned.copies.planned) == (4, 8)
    assert "copies: 3 of each of 4 training scans: 4 kept, 8 planned" in planned.lines()


def test_a_copy_that_is_not_finite_stops_with_its_name(scans, tmp_path):
    with pytest.raises(ScanError, match=r"s\d\.nii\.gz, copies/1: the autoencoder gives NaN"):
        run(scans, tmp_path / "out", Counting(broken_at=6), copies=1)
