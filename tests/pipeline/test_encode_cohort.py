"""What `encode` keeps of who was scanned: names, splits, classes and covariates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from neuromf.data.bids import Selection
from neuromf.data.latents import LatentDataset, load_latent
from neuromf.data.preprocessing import Preprocessing
from neuromf.files import read_json
from neuromf.models.autoencoder import load_autoencoder
from neuromf.pipeline.encode import encode
from neuromf.pipeline.evaluation_sets import held_back

SPEC = Preprocessing((16, 16, 16), spacing_mm=None)
FLAIR = Selection(("FLAIR",))


def run(inputs: list[Path], out: Path, **options):
    options = {"fractions": (0.5, 0.5, 0), "autoencoder": load_autoencoder("haar"), "preprocessing": SPEC} | options
    return encode(inputs, out, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.pt")}


def test_a_bids_tree_becomes_latents_that_know_who_they_show(bids_tree, tmp_path):
    report = run([bids_tree], tmp_path / "out", selection=FLAIR, class_column="sex")
    assert (report.encoded, report.refused) == (4, 0)
    splits = [{name.partition("_")[0] for name in members} for members in report.splits.values()]
    assert sorted(map(sorted, splits)) == [[], ["sub-01"], ["sub-02"]]
    metadata = load_latent(tmp_path / "out/sub-01_ses-b_FLAIR.pt")["metadata"]
    assert metadata["covariates"] == {"age": 23.5, "sex": "M", "site": "2", "ses": "b", "suffix": "FLAIR"}
    dataset = read_json(tmp_path / "out/dataset.json")
    assert dataset["covariates"]["of"]["sub-01_ses-b_FLAIR"] == metadata["covariates"]
    assert dataset["covariates"]["columns"]["age"]["type"] == "number"
    assert dataset["classes"]["names"] == ["F", "M"]
    for split in ("train", "val"):
        latents = LatentDataset(tmp_path / "out", split)
        assert latents.labels.tolist() == [int(name.startswith("sub-01")) for name in latents.subjects]


def test_a_corrected_covariate_reaches_finished_latents_and_nothing_else_changes(bids_tree, tmp_path):
    out = tmp_path / "out"
    run([bids_tree], out, selection=FLAIR)
    before, z = contents(out), load_latent(out / "sub-02_ses-a_FLAIR.pt")["z"]
    table = bids_tree / "participants.tsv"
    table.write_text(table.read_text().replace("sub-02\tn/a", "sub-02\t44"))
    again = run([bids_tree], out, selection=FLAIR)
    after = contents(out)
    assert again.kept == 4
    assert {name for name in before if before[name] != after[name]} == {
        "sub-02_ses-a_FLAIR.pt",
        "sub-02_ses-b_FLAIR.pt",
    }
    latent = load_latent(out / "sub-02_ses-a_FLAIR.pt")
    assert latent["metadata"]["covariates"]["age"] == 44
    assert torch.equal(latent["z"], z)
    assert after == contents(run([bids_tree], tmp_path / "fresh", selection=FLAIR).out)


def test_splits_of_a_table_are_the_splits_of_the_latents(bids_tree, tmp_path):
    rows = [f"study/sub-{s}/ses-{v}/anat/sub-{s}_ses-{v}_FLAIR.nii.gz,{s},{v}" for s in ("01", "02") for v in "ab"]
    table = tmp_path / "scans.csv"
    table.write_text(
        "path,subject,session,split\n" + "".join(f"{r},{'val' if ',01,' in r else 'train'}\n" for r in rows)
    )
    report = run([table], tmp_path / "out")
    assert report.splits == {"train": ["02_ses-a", "02_ses-b"], "val": ["01_ses-a", "01_ses-b"], "test": []}
    assert read_json(tmp_path / "out/dataset.json")["splits"]["given"] is True


@pytest.mark.parametrize("kind", ["tree", "table"])
def test_the_scans_held_back_are_found_again_in_what_was_encoded(bids_tree, tmp_path, kind):
    source = bids_tree
    if kind == "table":
        source = tmp_path / "scans.csv"
        paths = [path.relative_to(tmp_path) for path in sorted(bids_tree.rglob("*_FLAIR.nii.gz"))]
        source.write_text("path\n" + "".join(f"{path}\n" for path in paths))
    report = run([source], tmp_path / "out", selection=FLAIR if kind == "tree" else None)
    back = held_back(source, tmp_path / "out")
    assert [path.name.removesuffix(".nii.gz") for path in back.real] == report.splits["val"]
    assert len(back.train) == 2
