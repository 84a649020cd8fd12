from __future__ import annotations

from pathlib import Path

import pytest

from neuromf.data.bids import Selection
from neuromf.data.sources import check_subject, find_scans, find_sources, join_table, read_column, read_groups
from neuromf.errors import UserError

T1 = Selection(("T1w",))


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def subjects(inputs, selection: Selection | None = None) -> list[str]:
    return [scan.subject for scan in find_scans(inputs, selection)]


def table(folder: Path, text: str, name: str = "scans.csv") -> Path:
    (folder / name).write_text(text)
    return folder / name


# --- files, folders, globs -----------------------------------------------------------------------------------


def test_files_folders_and_globs_give_the_same_scans_once(tmp_path):
    touch(tmp_path, "b.nii.gz", "a.nii", "._a.nii", "notes.txt")
    expected = [("a", tmp_path / "a.nii"), ("b", tmp_path / "b.nii.gz")]
    for inputs in ([tmp_path], [tmp_path / "b.nii.gz", tmp_path], [f"{tmp_path}/*.nii*"]):
        assert [(scan.subject, scan.path) for scan in find_scans(inputs)] == expected


def test_a_folder_gives_what_lies_below_it_at_any_depth(tmp_path):
    touch(tmp_path, "a.nii", "x/b.nii.gz", "x/y/z/c.nii", "x/.trash/d.nii")
    assert subjects([tmp_path]) == ["a", "b", "c"]


def test_two_files_with_one_id_are_named(tmp_path):
    touch(tmp_path, "x/a.nii.gz", "y/A.nii")
    with pytest.raises(UserError) as caught:
        find_scans([tmp_path / "x", tmp_path / "y"])
    assert str(tmp_path / "x/a.nii.gz") in caught.value.message
    assert str(tmp_path / "y/A.nii") in caught.value.message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "no input was given"),
        ("empty", "holds no NIfTI file"),
        ("absent", "does not exist"),
        ("absent*.nii", "no NIfTI file matches"),
        ("*.txt", "it matches 1 other files"),
        ("e*", "holds no NIfTI file"),
        ("absent.csv", "does not exist"),
    ],
)
def test_no_scan_is_an_error_that_says_what_to_give(tmp_path, given, message):
    (tmp_path / "empty").mkdir()
    touch(tmp_path, "notes.txt")
    with pytest.raises(UserError) as caught:
        find_scans([] if given is None else [f"{tmp_path}/{given}"])
    assert message in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("subject", ["", "..", ".hidden", "-rf", "a/b", "a\\b", "a\nb", "a*", "x" * 300])
def test_ids_that_could_leave_the_folder_are_refused(subject):
    with pytest.raises(UserError):
        check_subject(subject)


def test_names_by_the_rules_of_bids_say_who_it_is_without_a_dataset(tmp_path):
    touch(tmp_path, "sub-1_ses-1_T1w.nii", "sub-1_ses-2_T1w.nii", "other.nii")
    assert [scan.participant for scan in find_scans([tmp_path])] == ["other", "sub-1", "sub-1"]


# --- BIDS trees ----------------------------------------------------------------------------------------------


def test_a_bids_tree_is_recognised_and_its_scans_keep_names_of_their_own(bids_tree):
    scans = find_scans([bids_tree], T1)
    assert scans[0].subject == "sub-01_ses-a_T1w"
    assert len({scan.subject for scan in scans}) == 10
    assert [scan.participant for scan in scans[:3]] == ["sub-01", "sub-01", "sub-02"]
    assert scans[0].covariates["suffix"] == "T1w"
    assert scans[0].covariates["ses"] == "a"


def test_two_contrasts_can_be_told_apart_by_their_suffix(bids_tree):
    sources = find_sources([bids_tree], Selection(("T1w", "FLAIR"), {"sub": ("01",)}))
    assert list(read_column(sources, "suffix").values()) == ["FLAIR", "T1w", "FLAIR", "T1w"]


def test_a_tree_below_a_folder_is_still_a_tree(bids_tree):
    touch(bids_tree.parent, "plain/x.nii")
    assert subjects([bids_tree.parent], T1) == subjects([bids_tree], T1) + ["x"]
    with pytest.raises(UserError, match="several kinds of scans"):
        find_scans([bids_tree.parent])


def test_trees_of_different_contrasts_are_not_mixed_unasked(tmp_path):
    for name, suffix in (("a", "T1w"), ("b", "FLAIR")):
        touch(tmp_path, f"{name}/sub-{name}/anat/sub-{name}_{suffix}.nii", f"{name}/dataset_description.json")
    with pytest.raises(UserError, match="different kinds of scans: FLAIR, T1w"):
        find_scans([tmp_path])
    assert subjects([tmp_path / "a"]) == ["sub-a_T1w"]


def test_folders_of_a_tree_belong_to_it(bids_tree):
    expected = ["sub-01_ses-a_T1w", "sub-01_ses-b_T1w"]
    for inputs in (["sub-01"], ["sub-01/ses-a", "sub-01/ses-b/anat"], ["sub-0[1]"]):
        sources = find_sources([f"{bids_tree}/{name}" for name in inputs], T1)
        assert [scan.subject for scan in sources.scans] == expected
        assert sources.scans[0].covariates["age"] == "21"
        assert [(table.path.name, table.absent) for table in sources.tables] == [("participants.tsv", [])]
    derived = find_sources([bids_tree / "derivatives/strip/sub-01"])
    assert [scan.subject for scan in derived.scans] == ["sub-01_desc-brain_T1w"]
    assert derived.trees == ()


# --- tables --------------------------------------------------------------------------------------------------


def test_rows_of_a_table_are_named_by_subject_and_session(tmp_path):
    touch(tmp_path, "1.nii", "2.nii", "3.nii")
    text = "path,subject,session,age\n1.nii,anna,1,30\n2.nii,anna,ses-2,31\n3.nii,bela,,40\n"
    scans = find_scans([table(tmp_path, text)])
    assert [(s.subject, s.participant) for s in scans] == [
        ("anna_ses-1", "anna"),
        ("anna_ses-2", "anna"),
        ("bela", "bela"),
    ]
    assert scans[1].covariates == {"age": "31"}


def test_a_table_without_subjects_takes_the_file_names(tmp_path):
    touch(tmp_path, "1.nii", "x/sub-7_T1w.nii")
    scans = find_scans([table(tmp_path, "path\n1.nii\nx/sub-7_T1w.nii\n")])
    assert [(s.subject, s.participant) for s in scans] == [("1", "1"), ("sub-7_T1w", "sub-7")]


def test_two_rows_of_one_subject_need_a_session(tmp_path):
    touch(tmp_path, "1.nii", "2.nii")
    with pytest.raises(UserError, match="two files have the subject id 'anna'") as caught:
        find_scans([table(tmp_path, "path,subject\n1.nii,anna\n2.nii,anna\n")])
    assert "session" in caught.value.hint


def test_a_file_under_two_names_is_refused(tmp_path):
    touch(tmp_path, "1.nii")
    with pytest.raises(UserError, match="is given twice, as 'anna' and as 'bela'"):
        find_scans([table(tmp_path, "path,subject\n1.nii,anna\n1.nii,bela\n")])


def test_given_splits_may_not_divide_a_subject_nor_leave_one_out(tmp_path):
    touch(tmp_path, "1.nii", "2.nii", "3.nii")
    rows = "path,subject,session,split\n1.nii,anna,1,train\n2.nii,anna,2,{}\n3.nii,bela,1,val\n"
    scans = find_scans([table(tmp_path, rows.format("train"))])
    assert [scan.split for scan in scans] == ["train", "train", "val"]
    with pytest.raises(UserError, match="'anna' are in two splits: anna_ses-1 in train, anna_ses-2 in test"):
        find_scans([table(tmp_path, rows.format("test"))])
    touch(tmp_path, "4.nii")
    with pytest.raises(UserError, match="1 of 4 scans have no split: 4"):
        find_scans([table(tmp_path, rows.format("train")), tmp_path / "4.nii"])


def test_a_subject_that_could_leave_the_folder_is_refused_in_a_table_too(tmp_path):
    touch(tmp_path, "1.nii")
    with pytest.raises(UserError, match="cannot be a file name"):
        find_scans([table(tmp_path, "path,subject\n1.nii,../up\n")])


# --- covariates, groups --------------------------------------------------------------------------------------


@pytest.fixture
def scans(tmp_path) -> Path:
    touch(tmp_path, "scans/a.nii.gz", "scans/b.nii.gz", "scans/c.nii.gz")
    return tmp_path / "scans"


def test_columns_of_a_table_are_joined_by_file_name(tmp_path, scans):
    people = table(tmp_path, "id\tgroup\na.nii.gz\tg1\nb\tg1\nc\t\nd\tg2\n", "subjects.tsv")
    sources = join_table(find_sources([scans]), people)
    assert sources.scans[0].covariates == {"group": "g1"}
    assert sources.tables[0].absent == ["d"]
    with pytest.raises(UserError, match=r"1 of 3 subjects have no 'group'.*subjects\.tsv: c"):
        read_groups(sources, "group")
    with pytest.raises(UserError, match="has no column 'gruop'") as caught:
        read_groups(sources, "gruop")
    assert "did you mean 'group'?" in caught.value.hint


def test_columns_of_a_table_are_joined_by_participant(tmp_path, bids_tree):
    people = table(tmp_path, "participant_id,dose\n01,low\nsub-02,high\n")
    sources = join_table(find_sources([bids_tree], Selection(("FLAIR",))), people)
    assert list(read_column(sources, "dose").values()) == ["low", "low", "high", "high"]
    assert list(read_column(sources, "sex").values()) == ["M", "M", "F", "F"]


def test_a_table_of_other_people_and_contradicting_rows_are_refused(tmp_path, scans):
    with pytest.raises(UserError, match=r"no id in the column 'subject' .* is one of the 3 scans, such as 'a'"):
        join_table(find_sources([scans]), table(tmp_path, "subject,group\nx,1\n"))
    with pytest.raises(UserError, match="line 3: 'a' is listed before with other values"):
        join_table(find_sources([scans]), table(tmp_path, "subject,group\na,1\na,2\n"))


def test_a_column_without_any_table_says_where_it_would_come_from(scans):
    with pytest.raises(UserError, match="the column 'sex' needs its table") as caught:
        read_column(find_sources([scans]), "sex")
    assert "--groups" in caught.value.hint


def test_sessions_of_a_participant_stay_together_and_no_group_divides_them(tmp_path, bids_tree):
    sources = find_sources([bids_tree], Selection(("T1w",), {"sub": ("01", "02")}))
    assert list(read_groups(sources, None).values()) == ["sub-01", "sub-01", "sub-02", "sub-02"]
    assert set(read_groups(sources, "site").values()) == {"1", "2"}
    with pytest.raises(UserError, match="the column 'ses' divides 'sub-01'"):
        read_groups(sources, "ses")
