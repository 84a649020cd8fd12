from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from neuromf.data.latents import LatentDataset, load_latent, load_latent_folder_info
from neuromf.data.preprocessing import Preprocessing, preprocess
from neuromf.data.volumes import load_volume
from neuromf.errors import ScanError, UserError
from neuromf.files import read_json, sha256_file
from neuromf.pipeline.encode import encode

SPEC = Preprocessing((16, 16, 16), spacing_mm=None)


class Posterior(NamedTuple):
    mean: torch.Tensor
    log_sigma: torch.Tensor


class Blocks:
    """Mean and maximum of 4^3 blocks: an autoencoder's interface, no weights, not flip-invariant by chance."""

    name, sha256, latent_channels, factor, device = "blocks", "0" * 64, 2, 4, "cpu"

    def __init__(self) -> None:
        self.calls = 0

    def check_size(self, size):
        if any(n % 4 for n in size):
            raise UserError(f"size {size} is not a multiple of 4", "give 16 16 16")

    def encode(self, volume):
        self.calls += 1
        mean = torch.cat([F.avg_pool3d(volume, 4), F.max_pool3d(volume, 4)], 1)
        return Posterior(mean, torch.full_like(mean, -3.0))

    def decode(self, latent):
        return F.interpolate(latent[:, :1], scale_factor=4)

    def reconstruct(self, volume):
        return self.decode(self.encode(volume).mean)


@pytest.fixture
def scans(tmp_path) -> Path:
    folder = tmp_path / "scans"
    folder.mkdir()
    for i in range(6):
        write(folder / f"s{i}.nii.gz", i)
    return folder


def write(path: Path, seed: int) -> None:
    array = np.random.default_rng(seed).gamma(2, 50, (15, 16, 18)).astype(np.float32)
    nib.save(nib.Nifti1Image(array, np.diag([-1, 1, 1.2, 1])), path)


def run(scans, out, autoencoder=None, **options):
    options = {"preprocessing": SPEC} | options
    return encode([str(scans)], out, autoencoder=autoencoder or Blocks(), **options)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "encode_report.json"}


def test_a_folder_of_scans_becomes_a_dataset(scans, tmp_path):
    report = run(scans, tmp_path / "out")
    assert (report.encoded, report.kept, report.refused) == (6, 0, 0)
    info = load_latent_folder_info(tmp_path / "out")
    assert info.dataset["latent_shape"] == [2, 4, 4, 4]
    assert info.dataset["autoencoder"] == {"name": "blocks", "sha256": "0" * 64, "latent_channels": 2, "factor": 4}
    assert Preprocessing.from_dict(info.dataset["preprocessing"]) == SPEC
    assert {name: len(s) for name, s in info.splits.items()} == {"train": 4, "val": 1, "test": 1}
    assert info.dataset["counts"] == {"train": 4, "val": 1, "test": 1, "refused": 0}
    assert info.statistics == report.statistics
    assert LatentDataset(tmp_path / "out").shape == (2, 4, 4, 4)
    assert "next: neuromf train" in report.lines()[-1]


def test_a_latent_is_the_posterior_mean_of_the_prepared_scan(scans, tmp_path):
    run(scans, tmp_path / "out")
    latent = load_latent(tmp_path / "out" / "s2.pt")
    prepared = preprocess(load_volume(scans / "s2.nii.gz"), SPEC)
    assert torch.equal(latent["z"], Blocks().encode(torch.from_numpy(prepared.array)[None]).mean[0])
    assert (latent["log_sigma"] == -3).all()
    assert latent["metadata"]["input"] == {"name": "s2.nii.gz", "sha256": sha256_file(scans / "s2.nii.gz")}
    assert latent["metadata"]["preprocessing"] == prepared.record


def test_statistics_come_from_the_training_split_alone(scans, tmp_path):
    out = tmp_path / "out"
    report = run(scans, out)
    z = torch.stack([load_latent(out / f"{s}.pt")["z"] for s in report.splits["train"]]).double()
    np.testing.assert_allclose(report.statistics.mean, z.mean((0, 2, 3, 4)), rtol=1e-9)
    assert report.statistics.files == len(report.splits["train"])


def test_the_affine_of_the_grid_has_its_origin_in_the_middle(scans, tmp_path):
    run(scans, tmp_path / "out")
    dataset = read_json(tmp_path / "out" / "dataset.json")
    affine = np.array(dataset["affine"])
    np.testing.assert_allclose(np.diag(affine)[:3], [1, 1, 1.2], rtol=1e-6)
    np.testing.assert_allclose(affine @ [7.5, 7.5, 7.5, 1], [0, 0, 0, 1], atol=1e-6)
    assert dataset["spacing_varies"] is False


def test_the_same_command_again_does_no_work_and_changes_no_byte(scans, tmp_path):
    run(scans, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    autoencoder = Blocks()
    again = run(scans, tmp_path / "out", autoencoder)
    assert (again.kept, autoencoder.calls) == (6, 0)
    assert snapshot(tmp_path / "out") == before


def test_changed_and_damaged_files_are_done_again_and_new_ones_added(scans, tmp_path):
    out = tmp_path / "out"
    run(scans, out)
    write(scans / "s1.nii.gz", 100)
    write(scans / "new.nii.gz", 101)
    (out / "s3.pt").write_bytes(b"damaged")
    again = run(scans, out)
    assert {s.subject for s in again.scans if s.status == "encoded"} == {"s1", "s3", "new"}
    assert snapshot(out) == snapshot(run(scans, tmp_path / "fresh").out)


@pytest.mark.parametrize("stop_at", [0, 3, 5])
def test_ctrl_c_leaves_whole_files_and_the_same_command_finishes(scans, tmp_path, stop_at):
    out = tmp_path / "out"

    def interrupt(description, done, total):
        if done == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(scans, out, progress=interrupt)
    assert len([load_latent(path) for path in out.glob("*.pt")]) == stop_at
    with pytest.raises(UserError, match="not finished"):
        load_latent_folder_info(out)
    resumed = run(scans, out)
    assert (resumed.kept, resumed.encoded) == (stop_at, 6 - stop_at)
    assert snapshot(out) == snapshot(run(scans, tmp_path / "straight").out)


def test_ctrl_c_while_encoding_leaves_no_partial_file(scans, tmp_path):
    class Interrupted(Blocks):
        def encode(self, volume):
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().encode(volume)

    with pytest.raises(KeyboardInterrupt):
        run(scans, tmp_path / "out", Interrupted())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["dataset.json", "s0.pt", "s1.pt"]


def test_one_bad_scan_is_reported_and_the_rest_are_the_same(scans, tmp_path):
    run(scans, tmp_path / "good")
    (scans / "bad.nii.gz").write_bytes((scans / "s0.nii.gz").read_bytes()[:100])
    report = run(scans, tmp_path / "out")
    assert (report.encoded, report.refused) == (6, 1)
    stored = json.loads((tmp_path / "out" / "encode_report.json").read_text())
    assert stored["counts"] == {"encoded": 6, "kept": 0, "planned": 0, "refused": 1}
    bad = next(scan for scan in stored["scans"] if scan["status"] == "refused")
    assert bad["subject"] == "bad"
    assert bad["reason"].startswith("the compressed file is truncated")
    assert bad["hint"]
    assert load_latent_folder_info(tmp_path / "out").splits == load_latent_folder_info(tmp_path / "good").splits
    assert (tmp_path / "out" / "s0.pt").read_bytes() == (tmp_path / "good" / "s0.pt").read_bytes()


def test_strict_stops_at_the_bad_scan_and_names_it(scans, tmp_path):
    flat = np.zeros((16, 16, 16), np.float32)
    flat[8, 8, 8] = 1
    nib.save(nib.Nifti1Image(flat, np.eye(4)), scans / "s2.nii.gz")
    with pytest.raises(ScanError, match=r"s2\.nii\.gz: percentiles"):
        run(scans, tmp_path / "out", strict=True)
    assert (tmp_path / "out" / "s1.pt").exists()


def test_no_usable_scan_is_an_error(tmp_path):
    (tmp_path / "bad.nii.gz").write_bytes(b"no")
    with pytest.raises(UserError, match=r"none of the 1 scans"):
        run(tmp_path / "bad.nii.gz", tmp_path / "out")


def test_latents_that_are_not_finite_are_refused(scans, tmp_path):
    class Broken(Blocks):
        def encode(self, volume):
            mean, log_sigma = super().encode(volume)
            return Posterior(mean * (torch.nan if self.calls == 2 else 1), log_sigma)

    report = run(scans, tmp_path / "out", Broken())
    assert [(s.subject, "NaN" in s.reason) for s in report.scans if s.status == "refused"] == [("s1", True)]


def other_autoencoder() -> Blocks:
    autoencoder = Blocks()
    autoencoder.sha256 = "1" * 64
    return autoencoder


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"autoencoder": other_autoencoder()}, "autoencoder.sha256"),
        ({"preprocessing": Preprocessing((16, 16, 16), 1.5)}, "preprocessing.spacing_mm"),
        ({"preprocessing": Preprocessing((16, 16, 32), None)}, "preprocessing.size"),
    ],
)
def test_a_folder_of_other_settings_is_refused_and_untouched(scans, tmp_path, change, word):
    run(scans, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    with pytest.raises(UserError) as caught:
        run(scans, tmp_path / "out", **change)
    assert word in caught.value.message
    assert "--out" in caught.value.hint
    assert snapshot(tmp_path / "out") == before


def test_a_folder_of_something_else_is_refused(scans, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 0")
    with pytest.raises(UserError, match=r"not a folder of latents.*config\.yaml"):
        run(scans, tmp_path / "run")
    with pytest.raises(UserError, match="is a file"):
        run(scans, scans / "s0.nii.gz")


def test_latents_of_scans_that_were_not_named_are_not_dropped_in_silence(scans, tmp_path):
    run(scans, tmp_path / "out")
    (scans / "s4.nii.gz").unlink()
    with pytest.raises(UserError, match=r"1 latents of scans that are not among the inputs.*s4\.pt"):
        run(scans, tmp_path / "out")


def test_a_size_the_autoencoder_cannot_take_is_refused_before_anything_is_written(scans, tmp_path):
    with pytest.raises(UserError, match="multiple of 4"):
        run(scans, tmp_path / "out", preprocessing=Preprocessing((18, 16, 16), None))
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(scans, tmp_path):
    report = run(scans, tmp_path / "out", dry_run=True)
    assert [s.status for s in report.scans] == ["planned"] * 6
    assert not (tmp_path / "out").exists()
    run(scans, tmp_path / "out")
    write(scans / "new.nii.gz", 7)
    assert run(scans, tmp_path / "out", dry_run=True).kept == 6


def test_groups_of_a_table_stay_together(scans, tmp_path):
    table = tmp_path / "subjects.csv"
    table.write_text("id,person\n" + "".join(f"s{i},p{i // 2}\n" for i in range(6)))
    report = run(scans, tmp_path / "out", groups_csv=table, group_column="person")
    assert sorted(map(sorted, report.splits.values())) == [["s0", "s1"], ["s2", "s3"], ["s4", "s5"]]


# --- classes -------------------------------------------------------------------------------------------------

CONTRASTS = {"s0": "T1", "s1": "FLAIR", "s2": "T1", "s3": "T1", "s4": "FLAIR", "s5": "T1"}


@pytest.fixture
def table(tmp_path) -> Path:
    path = tmp_path / "scans.csv"
    rows = [f"{subject},{contrast},p{subject[1]}" for subject, contrast in CONTRASTS.items()]
    path.write_text("\n".join(["subject,contrast,person", *rows]) + "\n")
    return path


@pytest.mark.parametrize("grouped", [{}, {"group_column": "person"}])
def test_classes_are_numbered_in_the_order_of_their_names_and_stay_with_their_scans(scans, tmp_path, table, grouped):
    run(scans, tmp_path / "out", groups_csv=table, class_column="contrast", **grouped)
    classes = read_json(tmp_path / "out" / "dataset.json")["classes"]
    assert classes == {"column": "contrast", "names": ["FLAIR", "T1"], "of": CONTRASTS}
    for split in ("train", "val", "test"):
        latents = LatentDataset(tmp_path / "out", split)
        assert latents.labels.dtype == torch.int64
        assert latents.labels.tolist() == [int(CONTRASTS[s] == "T1") for s in latents.subjects]


def test_copies_have_the_class_of_their_scan(scans, tmp_path, table):
    run(scans, tmp_path / "out", groups_csv=table, class_column="contrast", flip_copies=True, copies=1)
    latents = LatentDataset(tmp_path / "out", copies=True)
    assert latents.labels.tolist() == [int(CONTRASTS[s] == "T1") for s in latents.subjects]
    assert len(latents.labels) == len(latents) == 12


def test_scans_without_classes_have_no_labels(scans, tmp_path):
    run(scans, tmp_path / "out")
    assert LatentDataset(tmp_path / "out").labels is None


def test_a_class_of_refused_scans_alone_is_none(scans, tmp_path, table):
    (scans / "bad.nii.gz").write_bytes(b"no scan")
    table.write_text(table.read_text() + "bad,PET,p9\n")
    run(scans, tmp_path / "out", groups_csv=table, class_column="contrast")
    classes = read_json(tmp_path / "out" / "dataset.json")["classes"]
    assert classes["names"] == ["FLAIR", "T1"]
    assert classes["of"] == CONTRASTS


def test_a_scan_without_a_class_and_a_class_without_a_table_are_refused_before_any_work(scans, tmp_path, table):
    table.write_text(table.read_text().replace("s3,T1", "s3,"))
    with pytest.raises(UserError, match=r"1 of 6 subjects have no 'contrast' in .*scans\.csv: s3"):
        run(scans, tmp_path / "out", groups_csv=table, class_column="contrast")
    with pytest.raises(UserError, match="the column 'contrast' needs its table"):
        run(scans, tmp_path / "out", class_column="contrast")
    with pytest.raises(UserError, match="has no column 'modality'"):
        run(scans, tmp_path / "out", groups_csv=table, class_column="modality")
    assert not (tmp_path / "out").exists()


def test_quality_is_measured_on_request_and_kept(scans, tmp_path):
    assert run(scans, tmp_path / "out").reconstruction is None
    report = run(scans, tmp_path / "out", report=True)
    volume = torch.from_numpy(preprocess(load_volume(scans / "s0.nii.gz"), SPEC).array)[None]
    error = (volume.clamp(0, 1) - Blocks().reconstruct(volume).clamp(0, 1)).square().mean()
    assert report.scans[0].reconstruction["psnr_db"] == pytest.approx(-10 * float(torch.log10(error)), abs=1e-4)
    assert 0 < report.scans[0].reconstruction["ssim"] < 1
    assert report.reconstruction["n"] == 6
    kept = run(scans, tmp_path / "out", report=True)
    assert (kept.kept, kept.reconstruction) == (6, report.reconstruction)


def test_two_ids_with_the_same_content_are_noted(scans, tmp_path):
    (scans / "copy.nii.gz").write_bytes((scans / "s3.nii.gz").read_bytes())
    report = run(scans, tmp_path / "out")
    assert [s.subject for s in report.scans if any("same file content as copy" in n for n in s.notes)] == ["s3"]


def test_real_crops_encode_by_scan_group(shared_data, tmp_path):
    report = encode(
        sorted((shared_data / "hippocampus" / "images").glob("*.nii.gz"))[:12],
        tmp_path / "out",
        autoencoder=Blocks(),
        preprocessing=Preprocessing((48, 64, 48), 1.0),
        groups_csv=shared_data / "hippocampus" / "subjects.csv",
        group_column="scan_group",
    )
    assert (report.encoded, report.refused) == (12, 0)
    white = torch.stack(list(LatentDataset(tmp_path / "out")))
    assert white.shape[1:] == (2, 12, 16, 12)
    assert white.mean().abs() < 1e-3


def test_a_limit_of_memory_reaches_the_autoencoder(neuromf, scans, tmp_path):
    for folder, limit in (("free", []), ("limited", ["--memory", "0.01"])):
        words = ["encode", scans / "s0.nii.gz", scans / "s1.nii.gz", "--size", "32", "--out", folder, "--device", "cpu"]
        assert neuromf(*words, "--fractions", "1", "0", "0", "--quiet", *limit).exit_code == 0
    free, limited = (load_latent(tmp_path / folder / "s0.pt")["z"] for folder in ("free", "limited"))
    assert not torch.equal(free, limited), "the limit was not heard of"
    torch.testing.assert_close(free, limited, atol=1e-4, rtol=1e-4)
