from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from neuromf.data.bias_field import BiasCorrection
from neuromf.data.bids import Selection
from neuromf.data.preprocessing import Preprocessing
from neuromf.data.sources import Scan
from neuromf.errors import UserError
from neuromf.models.autoencoder import load_autoencoder
from neuromf.pipeline.check import check, check_scans
from neuromf.pipeline.check_scan import angles_of, check_scan
from neuromf.pipeline.cleaning import Cleaning
from neuromf.pipeline.cohort import read_cohort
from neuromf.pipeline.encode import encode

SPEC = Preprocessing((16, 16, 16), spacing_mm=None)
T1 = Selection(("T1w",))


def haar():
    return load_autoencoder("haar")


def head(shape=(24, 26, 22), seed=0) -> np.ndarray:
    """A noisy ellipsoid in air that reaches to one voxel from every side."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    inside = (grid**2).sum(0) < 0.8
    return (inside * np.random.default_rng(seed).uniform(60, 100, shape)).astype(np.float32)


def write(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Scan:
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return Scan(path.name.partition(".")[0], path)


# --- one scan ------------------------------------------------------------------------------------------------


def test_a_scan_on_the_grid_is_used_as_it_is(tmp_path):
    found = check_scan(write(tmp_path / "a.nii.gz", head((16, 16, 16))), SPEC)
    assert (found.verdict, found.changes, found.notes) == ("used", (), ())
    assert (found.orientation, found.shape, found.spacing_mm, found.dtype) == (
        "RAS",
        (16, 16, 16),
        (1, 1, 1),
        "float32",
    )
    assert (found.oblique_deg, found.shear_deg, found.non_finite_share, found.foreground_lost) == (0, 0, 0, 0)


def test_what_preprocessing_does_is_said_with_its_amounts(tmp_path):
    scan = write(tmp_path / "a.nii.gz", head(), np.diag([-0.5, 1, 1, 1]))
    found = check_scan(scan, Preprocessing((16, 16, 32), 1.0))
    assert found.verdict == "changed"
    assert found.changes == ("LAS to RAS", "resample 0.5x1x1 to 1 mm", "crop 0x10x0", "pad 4x0x10")
    assert (found.cropped, found.padded) == ((0, 10, 0), (4, 0, 10))
    assert found.foreground_lost > 0.1
    assert any(f"the crop loses {found.foreground_lost:.1%} of the head" in note for note in found.notes)


def test_the_same_image_in_another_orientation_type_and_compression_has_the_same_content(tmp_path):
    array = np.rint(head())
    one = check_scan(write(tmp_path / "a.nii.gz", array), SPEC)
    two = check_scan(write(tmp_path / "b.nii", array[::-1].astype(np.int16), np.diag([-1, 1, 1, 1])), SPEC)
    other = check_scan(write(tmp_path / "c.nii", array + 1), SPEC)
    assert one.content == two.content != other.content


def test_angles_are_those_of_rotation_and_shear():
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.1), -np.sin(0.1)], [np.sin(0.1), np.cos(0.1)]]
    assert angles_of(turn @ np.diag([1, 2, 3, 1])) == pytest.approx((np.degrees(0.1), 0), abs=1e-6)
    shear = np.eye(4)
    shear[0, 1] = np.tan(np.radians(10))
    assert angles_of(shear) == pytest.approx((10, 10), abs=1e-6)


def test_headers_that_contradict_themselves_are_noted(tmp_path):
    image = nib.Nifti1Image(head((16, 16, 16)), np.eye(4))
    image.set_sform(np.diag([-1, 1, 1, 1]), code=1)
    image.set_qform(np.eye(4), code=1)
    image.header.set_xyzt_units("micron")
    nib.save(image, tmp_path / "a.nii")
    notes = " ".join(check_scan(Scan("a", tmp_path / "a.nii"), SPEC).notes)
    assert "left and right are uncertain" in notes
    assert "unit of length is micron" in notes
    image.set_sform(np.diag([-1, -1, 1, 1]), code=1)
    nib.save(image, tmp_path / "a.nii")
    assert "differ by 180 degrees" in " ".join(check_scan(Scan("a", tmp_path / "a.nii"), SPEC).notes)
    image.set_sform(None, code=0)
    image.set_qform(None, code=0)
    nib.save(image, tmp_path / "a.nii")
    assert "states no orientation" in " ".join(check_scan(Scan("a", tmp_path / "a.nii"), SPEC).notes)


def test_what_is_refused_keeps_what_its_header_says(tmp_path):
    array = head((10, 10, 10))
    array.flat[:250] = np.nan
    found = check_scan(write(tmp_path / "a.nii", array), SPEC)
    assert (found.verdict, found.non_finite_share, found.shape) == ("refused", 0.25, (10, 10, 10))
    found = check_scan(write(tmp_path / "b.nii", np.stack([head()] * 2, -1)), SPEC)
    assert (found.verdict, found.shape[3], "4-D" in found.reason) == ("refused", 2, True)
    (tmp_path / "c.nii.gz").write_bytes(b"no")
    found = check_scan(Scan("c", tmp_path / "c.nii.gz"), SPEC)
    assert (found.verdict, found.shape, bool(found.hint)) == ("refused", (), True)
    assert check_scan(Scan("d", tmp_path / "absent.nii"), SPEC).reason == "the file does not exist"


def test_processes_find_what_one_does_in_the_same_order(tmp_path):
    scans = [write(tmp_path / f"{i:02}.nii.gz", head(seed=i)) for i in range(20)]
    (tmp_path / "07.nii.gz").write_bytes(b"no")
    assert list(check_scans(scans, SPEC, workers=2)) == list(check_scans(scans, SPEC, workers=1))


def test_a_killed_process_is_told_and_not_waited_for(tmp_path):
    path = write(tmp_path / "a.nii.gz", head()).path
    found = check_scans([Scan(f"s{i}", path) for i in range(400)], SPEC, workers=2)
    next(found)
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(UserError, match="was killed") as caught:
        list(found)
    assert "--workers 1" in caught.value.hint


# --- all of them ---------------------------------------------------------------------------------------------


@pytest.fixture
def report(bids_tree, tmp_path):
    return check(
        read_cohort([bids_tree], selection=T1, fractions=(0.6, 0.2, 0.2)),
        tmp_path / "latents",
        preprocessing=SPEC,
        load=haar,
        copies=2,
        workers=1,
    )


def test_every_fault_of_a_dataset_is_found(report):
    verdicts = {scan.participant: scan.verdict for scan in report.scans}
    refused = {name for name, verdict in verdicts.items() if verdict == "refused"}
    assert refused == {"sub-03", "sub-05", "sub-06"}
    assert report.counts == {"used": 0, "changed": 7, "refused": 3}
    reasons = {scan.participant: scan.reason for scan in report.scans}
    assert "truncated" in reasons["sub-03"]
    assert "4-D, 3 volumes" in reasons["sub-05"]
    assert "5.00% of the voxels are NaN or Inf" in reasons["sub-06"]
    assert [d.subjects for d in report.duplicates if d.leaks] == [["sub-01_ses-a_T1w", "sub-04_ses-a_T1w"]]
    sheared = next(scan for scan in report.scans if scan.participant == "sub-07")
    assert sheared.shear_deg == pytest.approx(np.degrees(np.arctan(0.2)), abs=0.1)
    warnings = "\n".join(report.warnings)
    assert "participants.tsv lists 1 without a scan: sub-08" in warnings
    assert "1 are not listed in participants.tsv: sub-09" in warnings
    assert len(report.complaints) == 3


def test_the_latents_and_their_disk_are_those_encode_writes(report, bids_tree, tmp_path):
    assert report.disk.latent_shape == (8, 8, 8, 8)
    assert report.disk.files == 7 + 2 * len(report.splits["train"])
    done = encode([bids_tree], tmp_path / "out", autoencoder=haar(), preprocessing=SPEC, selection=T1)
    assert {s.subject for s in done.scans if s.status == "refused"} == {
        s.subject for s in report.scans if s.verdict == "refused"
    }
    written = [path.stat().st_size for path in (tmp_path / "out").glob("*.pt")]
    assert len(written) == 7
    assert np.mean(written) == pytest.approx(report.disk.bytes_each, rel=0.1)


@pytest.mark.skipif(find_spec("SimpleITK") is None, reason="SimpleITK is not installed (pip install 'neuromf[prep]')")
def test_the_field_that_n4_leaves_in_every_latent_is_counted(tmp_path):
    for n in range(3):
        write(tmp_path / f"{n}.nii", head(seed=n))
    cleaning = Cleaning(bias=BiasCorrection(iterations=(2,)))
    cohort = read_cohort([tmp_path], fractions=(1, 0, 0))
    disk = check(cohort, tmp_path, preprocessing=SPEC, load=haar, cleaning=cleaning, workers=1).disk
    how = {"preprocessing": SPEC, "cleaning": cleaning, "fractions": (1, 0, 0)}
    encode([tmp_path], tmp_path / "out", autoencoder=haar(), **how)
    written = [path.stat().st_size for path in (tmp_path / "out").glob("*.pt")]
    assert np.mean(written) == pytest.approx(disk.bytes_each, rel=0.05)


def test_a_check_writes_nothing(report, bids_tree, tmp_path):
    assert sorted(path.name for path in tmp_path.iterdir()) == [bids_tree.name]


def test_the_table_has_a_row_for_each_scan_and_json_holds_everything(report):
    lines = report.lines()
    assert lines[0].split() == ["scan", "verdict", "axes", "voxels", "mm", "type", "what"]
    assert lines[1].split()[:5] == ["sub-01_ses-a_T1w", "changed", "LAS", "15x16x18", "1x1x1.2"]
    assert "10 scans of 8 participants: 7 changed, 3 refused" in lines
    assert "covariate age: number, 21 to 27, 3 missing" in lines
    assert not any(line.startswith("next:") for line in lines)
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False, default=str))
    assert values["counts"]["refused"] == 3
    assert values["scans"][0]["orientation"] == "LAS"


def test_mixed_voxel_sizes_matter_without_a_spacing_alone(report):
    one, two, *_ = report.scans
    turned = replace(one, orientation="SLP", spacing_mm=(1.2, 1.0, 1.0), shape=(18, 15, 16))
    assert not any("mixed" in text for text in replace(report, scans=(turned, two)).warnings)
    mixed = replace(report, scans=(one, replace(two, spacing_mm=(2.0, 2.0, 2.0))))
    assert any("mixed voxel sizes and no --spacing: 1x1x1.2 mm (1), 2x2x2 mm (1)" in text for text in mixed.warnings)
    fixed = replace(mixed, preprocessing=Preprocessing((16, 16, 16), 1.0))
    assert not any("mixed voxel sizes" in text for text in fixed.warnings)


def test_mixed_shapes_and_a_small_disk_are_told(report):
    scans = (replace(report.scans[0], shape=(512, 512, 30)), *report.scans[1:])
    assert any("mixed shapes: 15x16x18 (6), 512x512x30 (1)" in text for text in replace(report, scans=scans).warnings)
    full = replace(report, disk=report.disk._replace(bytes_free=1000))
    assert any("MB are free" in text for text in full.warnings)
    assert not any("are free" in text for text in report.warnings)


def test_duplicates_in_one_group_do_not_leak(bids_tree, tmp_path):
    people = tmp_path / "families.csv"
    people.write_text("subject,family\n" + "".join(f"sub-{i:02},{'x' if i in (1, 4) else i}\n" for i in range(1, 10)))
    cohort = read_cohort([bids_tree], selection=T1, table=people, group_column="family")
    found = check(cohort, tmp_path / "out", preprocessing=SPEC, load=haar, workers=1)
    assert [d.leaks for d in found.duplicates] == [False]


def test_an_autoencoder_that_is_not_there_is_a_problem_and_the_scans_are_still_told(bids_tree, tmp_path):
    def absent():
        raise UserError("no weights", "fetch them")

    cohort = read_cohort([bids_tree], selection=T1)
    found = check(cohort, tmp_path / "out", preprocessing=SPEC, load=absent, workers=1)
    assert (found.disk, len(found.scans)) == (None, 10)
    assert found.complaints[0] == "the autoencoder cannot be loaded: no weights"


def test_real_heads_are_told_by_their_contents(shared_data, tmp_path):
    names = ("M2208_T2w", "MNI152_T1_2mm", "MR_Gd")
    cohort = read_cohort([shared_data / "wholebrain" / f"{name}.nii.gz" for name in names])
    found = check(cohort, tmp_path, preprocessing=Preprocessing((96, 112, 96), 2.0), load=haar, workers=1)
    axes = {scan.subject: scan.orientation for scan in found.scans}
    assert axes == {"M2208_T2w": "LAS", "MNI152_T1_2mm": "LAS", "MR_Gd": "RAS"}
    assert next(s.oblique_deg for s in found.scans if s.subject == "MR_Gd") == pytest.approx(6.5, abs=0.1)
    assert found.counts["refused"] == 0


# --- the command ---------------------------------------------------------------------------------------------


def test_the_command_tells_what_it_found_and_leaves_with_4(neuromf, bids_tree):
    words = [
        "encode",
        bids_tree,
        "--suffix",
        "T1w",
        "--autoencoder",
        "haar",
        "--size",
        "16",
        "--check",
        "--workers",
        "1",
    ]
    done = neuromf(*words)
    assert done.exit_code == 4
    assert "10 scans of 8 participants: 7 changed, 3 refused" in done.stdout
    assert "sub-03_ses-a_T1w.nii.gz: the compressed file is truncated" in done.stderr
    assert not Path("latents").exists()
    done = neuromf(*words, "--json", "--quiet", "--entity", "sub=01,02", "ses=a")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["counts"] == {"used": 0, "changed": 2, "refused": 0}


def test_a_wrong_suffix_ends_before_any_work(neuromf, bids_tree):
    done = neuromf("encode", bids_tree, "--suffix", "T2w", "--check")
    assert done.exit_code == 2
    assert "it has T1w (10), FLAIR (4)" in done.stderr
