from __future__ import annotations

import csv
import math
from pathlib import Path

from neuromf.reporting.paper_tables import escape, interval_text, latex_table, p_text, write_table

ROWS = [
    {"method": "x & y_1", "FID": 1.23456, "share": "12 %", "p": "<0.001"},
    {"method": "z", "FID": None, "share": None, "p": "0.040"},
]


def test_latex_is_a_booktabs_table_with_numbers_to_the_right_and_everything_escaped() -> None:
    assert latex_table(ROWS, caption="50 % off", label="tab:a").splitlines() == [
        r"\begin{table}",
        r"\centering",
        r"\caption{50 \% off}",
        r"\label{tab:a}",
        r"\begin{tabular}{lrrr}",
        r"\toprule",
        r"method & FID & share & p \\",
        r"\midrule",
        r"x \& y\_1 & 1.235 & 12 \% & \textless{}0.001 \\",
        r"z &  &  & 0.040 \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]


def test_a_backslash_is_escaped_once() -> None:
    assert escape(r"\a_{b}") == r"\textbackslash{}a\_\{b\}"


def test_the_three_forms_hold_the_same_rows(tmp_path: Path) -> None:
    files = write_table(tmp_path / "tables", "one", ROWS, "Caption.", ["method", "FID"])
    with files.csv.open() as handle:
        assert list(csv.DictReader(handle)) == [{"method": "x & y_1", "FID": "1.23456"}, {"method": "z", "FID": ""}]
    assert files.markdown.read_text().startswith("Caption.\n\n| method | FID |\n")
    assert r"\label{tab:one}" in files.latex.read_text()


def test_an_interval_is_left_out_where_there_is_none() -> None:
    assert interval_text(0.5, 0.25, 1.0) == "0.5000 [0.2500, 1.000]"
    assert interval_text(0.5, None, None) == interval_text(0.5, math.nan, math.nan) == "0.5000"


def test_a_small_p_is_a_bound() -> None:
    assert [p_text(p) for p in (0.0009999, 0.001, 0.0336262)] == ["<0.001", "0.001", "0.034"]
