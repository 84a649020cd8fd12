from __future__ import annotations

from pathlib import Path

import pytest

from neuromf.data.tables import describe_columns, read_scan_table, read_table, typed
from neuromf.errors import UserError


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "id,age\ns1,30\ns2,n/a\n"),
        ("a.tsv", "id\tage\ns1\t30\ns2\tNaN\n"),
        ("semicolons.csv", "\ufeffid;age\r\ns1; 30\r\n\r\ns2;\r\n"),
        ("pandas.csv", ",id,age\n0,s1,30\n1,s2,NA\n"),
    ],
)
def test_separators_byte_order_marks_and_missing_values_are_understood(tmp_path, name, text):
    table = read_table(write(tmp_path / name, text))
    assert table.columns == ["id", "age"]
    assert [row.values for row in table.rows] == [{"id": "s1", "age": "30"}, {"id": "s2"}]


def test_all_faulty_lines_are_listed_at_once(tmp_path):
    with pytest.raises(UserError) as caught:
        read_table(write(tmp_path / "a.csv", "id,age,age\ns1,1,2\ns2,1\ns3,1,2,3\n"))
    assert "column 'age' is there twice" in caught.value.message
    assert "line 3: 2 cells, the header has 3" in caught.value.message
    assert "line 4: 4 cells" in caught.value.message


@pytest.mark.parametrize("content", [b"", b"\n\n", b"id\n\xff\xfe\n", b'id,b\n"1,2\n' + b"x" * 200_000])
def test_what_is_no_table_is_a_users_error(tmp_path, content):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.csv"):
        read_table(tmp_path / "a.csv")


def test_a_long_list_of_faults_is_cut(tmp_path):
    with pytest.raises(UserError, match="and 22 more"):
        read_table(write(tmp_path / "a.csv", "a,b\n" + "1\n" * 30))


def test_paths_of_a_scan_table_are_relative_to_it_and_other_columns_are_covariates(tmp_path):
    (tmp_path / "x.nii").touch()
    text = f"Path,subject,session,split,age\nx.nii,s1,1,train,30\n{tmp_path}/x.nii,s2,2,val,\n"
    one, two = read_scan_table(write(tmp_path / "scans.csv", text))
    assert one == (tmp_path / "x.nii", "s1", "1", "train", {"age": "30"})
    assert (two.path, two.split, two.covariates) == (tmp_path / "x.nii", "val", {})


def test_bids_names_of_the_columns_are_understood(tmp_path):
    (tmp_path / "x.nii").touch()
    text = "path\tparticipant_id\tsession_id\nx.nii\tsub-1\tses-2\n"
    (scan,) = read_scan_table(write(tmp_path / "scans.tsv", text))
    assert scan[1:] == ("sub-1", "ses-2", None, {})


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("paht,age", "unknown column 'paht': did you mean 'path'?"),
        ("path,subjct", "did you mean 'subject'?"),
        ("path,subject,sesion", "did you mean 'session'?"),
        ("path,splits", "did you mean 'split'?"),
        ("file,age", "no column 'path', which names the files; its columns: file, age"),
        ("path,session", "a column 'session' without a column 'subject'"),
    ],
)
def test_wrong_columns_are_named_with_what_was_probably_meant(tmp_path, header, message):
    with pytest.raises(UserError) as caught:
        read_scan_table(write(tmp_path / "scans.csv", f"{header}\na.nii,{header.count(',') * 'x,'}"[:-1] + "\n"))
    assert message in caught.value.message


def test_faulty_rows_are_listed_with_their_line(tmp_path):
    (tmp_path / "x.nii").touch()
    text = "path,subject,split\nx.nii,s1,train\n,s2,val\nx.nii,,vall\nx.nii,s4,\n"
    with pytest.raises(UserError) as caught:
        read_scan_table(write(tmp_path / "scans.csv", text))
    lines = caught.value.message.splitlines()[1:]
    assert lines == [
        "  line 3: no path",
        "  line 4: no subject",
        "  line 4: no split 'vall' (did you mean 'val'?); there are train, val, test",
        "  line 5: no split",
    ]


def test_a_table_of_which_no_file_exists_says_what_paths_are_relative_to(tmp_path):
    with pytest.raises(UserError, match="none of the 2 files") as caught:
        read_scan_table(write(tmp_path / "scans.csv", "path\na.nii\nb.nii\n"))
    assert "relative to the folder of the table" in caught.value.hint


def test_columns_are_numbers_or_classes():
    rows = {
        "a": {"age": "20", "sex": "F", "site": "1"},
        "b": {"age": "40.5", "sex": "M", "site": "2"},
        "c": {"sex": "F"},
    }
    columns = describe_columns(rows, declared_classes=["site"])
    assert columns["age"] == {"type": "number", "missing": 1, "minimum": 20, "mean": 30.25, "maximum": 40.5}
    assert columns["sex"] == {"type": "class", "missing": 0, "counts": {"F": 2, "M": 1}}
    assert columns["site"] == {"type": "class", "missing": 1, "counts": {"1": 1, "2": 1}}
    assert typed(rows["b"], columns) == {"age": 40.5, "sex": "M", "site": "2"}
    assert typed(rows["c"], columns) == {"age": None, "sex": "F", "site": None}


def test_one_word_among_numbers_makes_classes():
    assert describe_columns({"a": {"dose": "1"}, "b": {"dose": "high"}})["dose"]["type"] == "class"
