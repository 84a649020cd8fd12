from __future__ import annotations

from pathlib import Path

import pytest

from neuromf.data.bids import Selection
from neuromf.errors import UserError
from neuromf.pipeline.cohort import read_cohort

T1 = Selection(("T1w",))


def given(folder: Path, splits: dict[str, str]) -> Path:
    for name in splits:
        (folder / f"{name}.nii").touch()
    rows = [f"{name}.nii,{name},{split}\n" for name, split in splits.items()]
    (folder / "scans.csv").write_text("path,subject,split\n" + "".join(rows))
    return folder / "scans.csv"


@pytest.mark.parametrize("seed", range(5))
def test_drawn_splits_never_divide_a_participant(bids_tree, seed):
    cohort = read_cohort([bids_tree], selection=T1, fractions=(0.5, 0.25, 0.25), seed=seed)
    splits = cohort.splits(scan.subject for scan in cohort.scans)
    people = [{name.split("_")[0] for name in members} for members in splits.values()]
    assert sum(map(len, people)) == len(set().union(*people)) == 8
    assert sum(map(len, splits.values())) == 10


def test_given_splits_are_kept_and_refused_scans_leave_them(tmp_path):
    cohort = read_cohort([given(tmp_path, {"a": "train", "b": "test", "c": "train"})])
    assert cohort.splits("abc") == {"train": ["a", "c"], "val": [], "test": ["b"]}
    assert cohort.splits("ab") == {"train": ["a"], "val": [], "test": ["b"]}
    assert cohort.to_dict("ab")["splits"]["given"] is True
    with pytest.raises(UserError, match="no usable scan is in the split 'train'"):
        cohort.splits("b")


def test_nobody_to_train_on_is_seen_before_any_work(tmp_path):
    with pytest.raises(UserError, match="'train'"):
        read_cohort([given(tmp_path, {"a": "val", "b": "test"})])


def test_participants_tsv_gives_classes_and_typed_covariates(bids_tree):
    cohort = read_cohort(
        [bids_tree],
        selection=Selection(("T1w",), {"sub": ("01", "02")}),
        class_column="sex",
        fractions=(0.5, 0.5, 0),
    )
    described = cohort.to_dict(scan.subject for scan in cohort.scans)
    assert described["classes"]["names"] == ["F", "M"]
    assert described["classes"]["of"]["sub-02_ses-b_T1w"] == "F"
    columns = described["covariates"]["columns"]
    assert (columns["age"]["type"], columns["age"]["missing"]) == ("number", 2)
    assert columns["site"] == {"type": "class", "missing": 0, "counts": {"1": 2, "2": 2}}
    assert described["covariates"]["of"]["sub-01_ses-b_T1w"] == {
        "age": 23.5,
        "sex": "M",
        "site": "2",
        "ses": "b",
        "suffix": "T1w",
    }
    assert described["participants"] == 2
    assert described["selection"] == {"suffixes": ["T1w"], "entities": {"sub": ["01", "02"]}}


def test_a_class_that_somebody_lacks_is_refused_with_who(bids_tree):
    with pytest.raises(UserError, match=r"1 of 10 subjects have no 'sex' in .*participants\.tsv: sub-09_ses-a_T1w"):
        read_cohort([bids_tree], selection=T1, class_column="sex")


def test_a_column_keeps_its_type_where_the_words_in_it_were_refused(tmp_path):
    table = given(tmp_path, {"a": "train", "b": "train"})
    table.write_text("path,dose\na.nii,1\nb.nii,high\n")
    described = read_cohort([table], fractions=(1, 0, 0)).to_dict(["a"])["covariates"]
    assert described["columns"]["dose"] == {"type": "class", "missing": 0, "counts": {"1": 1}}
    assert described["of"] == {"a": {"dose": "1"}}


def test_selecting_from_what_is_no_bids_dataset_is_refused(tmp_path):
    (tmp_path / "a.nii").touch()
    with pytest.raises(UserError, match="--suffix and --entity select from BIDS datasets"):
        read_cohort([tmp_path], selection=T1)
