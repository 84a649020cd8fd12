from __future__ import annotations

import json
from pathlib import Path

import pytest

from neuromf.data.bids import BidsName, Selection, nifti_below, parse_name, read_bids
from neuromf.errors import UserError

T1 = Selection(("T1w",))


def stems(tree) -> list[str]:
    return [scan.path.name.removesuffix(".nii.gz") for scan in tree.scans]


@pytest.fixture
def small(tmp_path) -> Path:
    """Two people, runs with and without zeros before them, an acquisition, a bold series, and what lies beside."""
    root = tmp_path / "small"
    for name in (
        "sub-1/anat/sub-1_run-01_T1w.nii.gz",
        "sub-1/anat/sub-1_acq-mprage_run-2_T1w.nii.gz",
        "sub-1/anat/sub-1_space-other_desc_T1w.nii.gz",
        "sub-1/anat/sub-2_T1w.nii.gz",
        "sub-1/sub-1_T1w.nii.gz",
        "sub-1/func/sub-1_task-rest_bold.nii.gz",
        "sub-1/anat/.hidden_T1w.nii.gz",
        "sub-2/ses-x/anat/sub-2_ses-x_T1w.nii",
        "sub-2/ses-x/anat/sub-2_ses-y_T1w.nii",
        "derivatives/other/sub-1/anat/sub-1_T1w.nii.gz",
        "sourcedata/sub-1/anat/sub-1_T1w.nii.gz",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "dataset_description.json").write_text("{}")
    return root


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sub-01_T1w.nii.gz", BidsName({"sub": "01"}, "T1w")),
        (
            "sub-01_ses-02_acq-hi+res_run-1_FLAIR.nii",
            BidsName({"sub": "01", "ses": "02", "acq": "hi+res", "run": "1"}, "FLAIR"),
        ),
        ("T1w.nii.gz", None),
        ("sub-01.nii.gz", None),
        ("ses-1_sub-01_T1w.nii.gz", None),
        ("sub-01_run_T1w.nii.gz", None),
        ("sub-01_run-1_run-2_T1w.nii.gz", None),
        ("sub-0 1_T1w.nii.gz", None),
        ("sub-01_T1w copy.nii.gz", None),
    ],
)
def test_names_are_read_by_the_rules(name, expected):
    assert parse_name(name) == expected


def test_only_what_lies_where_its_name_says_is_a_scan(small):
    tree = read_bids(small, T1)
    assert stems(tree) == ["sub-1_acq-mprage_run-2_T1w", "sub-1_run-01_T1w", "sub-2_ses-x_T1w.nii"]
    assert sorted(path.name for path in tree.overlooked) == [
        "sub-1_T1w.nii.gz",
        "sub-1_space-other_desc_T1w.nii.gz",
        "sub-2_T1w.nii.gz",
        "sub-2_ses-y_T1w.nii",
    ]


@pytest.mark.parametrize(
    ("entities", "expected"),
    [
        ({"run": ("1",)}, ["sub-1_run-01_T1w"]),
        ({"run": ("1", "02")}, ["sub-1_acq-mprage_run-2_T1w", "sub-1_run-01_T1w"]),
        ({"run": ("none",)}, ["sub-2_ses-x_T1w.nii"]),
        ({"acq": ("none",), "sub": ("sub-1",)}, ["sub-1_run-01_T1w"]),
    ],
)
def test_entities_select_indices_by_number_and_none_by_absence(small, entities, expected):
    assert stems(read_bids(small, Selection(("T1w",), entities))) == expected


def test_what_selects_nothing_says_what_there_is(small):
    with pytest.raises(UserError, match=r"suffix 'T2w'; it has T1w \(3\), bold \(1\)") as caught:
        read_bids(small, Selection(("T2w",)))
    assert "did you mean 'T1w'?" in caught.value.hint
    with pytest.raises(UserError, match="has acq=mp2rage") as caught:
        read_bids(small, Selection(("T1w",), {"acq": ("mp2rage",)}))
    assert caught.value.hint == "acq is there: mprage (1), none (2)"
    with pytest.raises(UserError, match="the entity 'acquisition'") as caught:
        read_bids(small, Selection(("T1w",), {"acquisition": ("mprage",)}))
    assert "acq" in caught.value.hint


def test_a_single_kind_of_anatomical_scan_needs_no_suffix_and_several_do(small, bids_tree):
    assert len(read_bids(small, Selection()).scans) == 3
    with pytest.raises(UserError, match=r"several kinds of scans: T1w \(10\), FLAIR \(4\)") as caught:
        read_bids(bids_tree, Selection())
    assert "--suffix T1w" in caught.value.hint


def test_participants_and_sessions_are_joined_and_the_session_wins(bids_tree):
    scans = {scan.path.name[:12]: scan.covariates for scan in read_bids(bids_tree, T1).scans}
    assert scans["sub-01_ses-a"] == {"age": "21", "sex": "M", "site": "2"}
    assert scans["sub-01_ses-b"]["age"] == "23.5"
    assert scans["sub-02_ses-b"] == {"sex": "F", "site": "1"}
    assert scans["sub-09_ses-a"] == {}


def test_who_is_missing_is_told_in_both_directions(bids_tree):
    tree = read_bids(bids_tree, T1)
    assert (tree.absent, tree.unlisted, tree.coded) == (["sub-08"], ["sub-09"], {"site"})
    assert read_bids(bids_tree, Selection(("T1w",), {"ses": ("b",)})).absent == [f"sub-{i:02}" for i in range(3, 9)]
    assert read_bids(bids_tree, Selection(("T1w",), {"sub": ("01",)})).absent == []


def test_derivatives_are_left_out_and_taken_when_named_with_the_participants_of_their_dataset(bids_tree):
    assert not any("derivatives" in scan.path.relative_to(bids_tree).parts for scan in read_bids(bids_tree, T1).scans)
    derived = bids_tree / "derivatives/strip"
    (derived / "dataset_description.json").write_text(json.dumps({"DatasetType": "derivative"}))
    (scan,) = read_bids(derived, T1).scans
    assert scan.name.entities == {"sub": "01", "desc": "brain"}
    assert scan.covariates["sex"] == "M"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id\tage\nsub-01\t3\n", "no column 'participant_id'"),
        ("participant_id\tage\nsub-01\t3\nsub-01\t4\n", "'sub-01' is listed 2 times"),
        ("participant_id\tage\nn/a\t3\n", "1 rows without one"),
        ("participant_id\tage\nsub-01 3\n", "1 cells"),
    ],
)
def test_a_faulty_participants_table_is_refused(bids_tree, text, message):
    (bids_tree / "participants.tsv").write_text(text)
    with pytest.raises(UserError) as caught:
        read_bids(bids_tree, T1)
    assert message in caught.value.message


def test_a_faulty_description_of_the_columns_is_refused(bids_tree):
    for text in ("[1]", "{"):
        (bids_tree / "participants.json").write_text(text)
        with pytest.raises(UserError, match=r"participants\.json"):
            read_bids(bids_tree, T1)


def test_ids_without_their_prefix_are_understood(bids_tree):
    (bids_tree / "participants.tsv").write_text("participant_id\tage\n01\t30\n")
    assert read_bids(bids_tree, T1).scans[0].covariates["age"] == "21"
    assert "sub-02" in read_bids(bids_tree, T1).unlisted


def test_a_tree_without_scans_says_how_they_are_named(tmp_path):
    (tmp_path / "dataset_description.json").write_text("{}")
    (tmp_path / "sub-1").mkdir()
    with pytest.raises(UserError, match=r"has no scan\n") as caught:
        read_bids(tmp_path, Selection())
    assert "anat" in caught.value.hint
    (tmp_path / "sub-1/head.nii").touch()
    with pytest.raises(UserError, match="1 NIfTI files are not named by its rules"):
        read_bids(tmp_path, Selection())


def test_links_in_a_circle_end_and_broken_ones_are_listed(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.nii").touch()
    (tmp_path / "a/loop").symlink_to(tmp_path)
    (tmp_path / "broken.nii.gz").symlink_to(tmp_path / "nowhere")
    assert sorted(path.name for path in nifti_below(tmp_path)) == ["broken.nii.gz", "x.nii"]


def test_a_selection_survives_json():
    selection = Selection(("T1w",), {"run": ("1", "none")})
    assert Selection.from_dict(json.loads(json.dumps(selection.to_dict()))) == selection
    assert Selection.from_dict(None) == Selection()
