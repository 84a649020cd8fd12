from __future__ import annotations

import csv

import pytest

from neuromf.reporting.tables import format_number, markdown_table, write_csv

ROWS = [{"set": "real", "N": 64, "distance": 0.0123456}, {"set": "a|b", "N": 8, "note": "x\ny"}]


def test_markdown_has_every_column_in_order_and_aligns_numbers() -> None:
    assert markdown_table(ROWS).splitlines() == [
        "| set | N | distance | note |",
        "| --- | ---: | ---: | --- |",
        "| real | 64 | 0.01235 |  |",
        "| a\\|b | 8 |  | x y |",
    ]


def test_columns_can_be_chosen() -> None:
    assert markdown_table(ROWS, ["N", "set"]).splitlines()[2] == "| 64 | real |"


def test_csv_reads_back_in_full_precision(tmp_path) -> None:
    write_csv(ROWS, tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert float(rows[0]["distance"]) == 0.0123456
    assert rows[1]["note"] == "x\ny"
    assert rows[1]["distance"] == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123456, "0.01235"), (1234.5, "1234"), (12, "12"), (-3.14159, "-3.142"), (0.0, "0"), (1e-9, "1e-09")]
    + [(0.1, "0.1000"), (float("inf"), "inf"), (float("nan"), "nan"), (True, "True"), (99999.0, "99999")],
)
def test_numbers_read_well(value, text) -> None:
    assert format_number(value) == text
