from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from neuromf.data.structure_tables import TOTAL, read_structure_table, write_structure_table
from neuromf.errors import UserError

HEADER = "subject,total intracranial,left cerebral white matter,csf\n"


def _file(folder: Path, text: str, name: str = "volumes.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_table_of_synthseg_is_read_in_ml(tmp_path: Path) -> None:
    table = read_structure_table(
        _file(tmp_path, HEADER + "anna,1400000.0,230000.5,250000\nbela,1500000,240000,260000\n")
    )
    assert table.subjects == ["anna", "bela"]
    assert table.names == [TOTAL, "left cerebral white matter", "csf"]
    np.testing.assert_allclose(table.ml[0], [1400, 230.0005, 250])
    np.testing.assert_allclose(table.columns(["csf"])[:, 0], [250, 260])


def test_a_single_head_s_empty_corner_tabs_and_capitals_are_understood(tmp_path: Path) -> None:
    table = read_structure_table(_file(tmp_path, "\tBrain-Stem\tCSF\n\nanna\t22000\t250000\n", "aseg.tsv"))
    assert (table.subjects, table.names) == (["anna"], ["brain-stem", "csf"])


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    ml = np.array([[480.25, 17.125], [500.5, 30.0]])
    write_structure_table(tmp_path / "a.csv", ["x", "y"], ["white", "ventricle"], ml)
    table = read_structure_table(tmp_path / "a.csv")
    assert table.subjects == ["x", "y"]
    np.testing.assert_allclose(table.ml, ml)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no table of volumes"),
        ("subject\nanna\n", "no table of volumes"),
        (HEADER, "no table of volumes"),
        (HEADER + "anna,1400000,230000\n", "2 volumes, and there are 3"),
        (HEADER + "anna,1400000,nan,2\n", "'nan' in row 'anna', column 'left cerebral white matter'"),
        (HEADER + "anna,1400000,-3,2\n", "'-3'"),
        (HEADER + "anna,1400000,failed,2\n", "'failed'"),
        (HEADER + "anna,1400,230,2\n", "which is no brain"),
        (HEADER + "anna,1400000,1,2\nanna,1400000,1,2\n", "two rows 'anna'"),
        ("subject,csf,CSF\nanna,200000,200000\n", "two columns 'csf'"),
    ],
)
def test_what_is_no_table_of_volumes_is_refused_with_the_cell(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_structure_table(_file(tmp_path, text))


def test_an_absent_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_structure_table(tmp_path / "no.csv")
    (tmp_path / "x.csv").write_bytes(b"\xff\xfe\x00binary\x80")
    with pytest.raises(UserError, match="cannot be read as a table"):
        read_structure_table(tmp_path / "x.csv")
