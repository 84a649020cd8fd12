"""CSV and TSV tables of scans and people, read strictly; and what their columns hold.

A missing value is an empty cell, `n/a` (BIDS), `NA` or `NaN`. Every fault of a table is listed at once.
"""

from __future__ import annotations

import csv
import difflib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from neuromf.data.splits import SPLITS
from neuromf.errors import UserError

TABLE_SUFFIXES = (".csv", ".tsv")
# The columns of a table of scans that mean something here; every other one is a covariate.
SCAN_COLUMNS = ("path", "subject", "session", "split")
_ALSO = {"subject": ("participant_id", "participant", "subject_id"), "session": ("session_id",)}

_MISSING = ("", "n/a", "na", "nan")
_NEAR = 0.72
_LISTED = 8


class Row(NamedTuple):
    """One line of a table: its number in the file, and its values by column, missing ones left out."""

    line: int
    values: dict[str, str]


class Table(NamedTuple):
    """A table as text."""

    path: Path
    columns: list[str]
    rows: list[Row]


class ListedScan(NamedTuple):
    """One row of a table of scans; `path` is absolute or relative to where the program runs."""

    path: Path
    subject: str | None
    session: str | None
    split: str | None
    covariates: dict[str, str]


def read_table(path: str | Path) -> Table:
    """Read a table: tabs in a `.tsv`, else commas, or semicolons where the header has those alone.

    Raises:
        UserError: unreadable, without a header, a column named twice, or lines with too many or too few cells.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            header = handle.readline()
            handle.seek(0)
            reader = csv.reader(handle, delimiter=_delimiter(path, header))
            lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if any(cells)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot read the table {path}: {reason}", "give a CSV or TSV file in UTF-8") from error
    if not lines:
        raise UserError(f"the table {path} is empty", "its first line names the columns")
    columns = lines[0][1]
    twice = sorted(name for name, n in Counter(columns).items() if n > 1 and name)
    problems = [f"column '{name}' is there twice" for name in twice]
    problems += [f"line {n}: {len(c)} cells, the header has {len(columns)}" for n, c in lines if len(c) != len(columns)]
    refuse(path, problems, "quote values that hold the separator")
    # pandas writes its index under an empty name.
    rows = [Row(n, {k: v for k, v in zip(columns, c, strict=True) if k and not is_missing(v)}) for n, c in lines[1:]]
    return Table(path, [name for name in columns if name], rows)


def is_missing(value: str) -> bool:
    """Whether a cell says that there is no value."""
    return value.strip().lower() in _MISSING


def read_scan_table(path: str | Path) -> list[ListedScan]:
    """Read a table with one scan a row: `path` (relative to the table), subject, session, split, covariates.

    The case of the four names does not matter, and BIDS' participant_id and session_id are understood. Whether the
    files exist is seen when they are read.

    Raises:
        UserError: no column `path`, a name that is nearly one of the four, or faulty rows (all are listed).
    """
    table = read_table(path)
    lower = {name.lower(): name for name in table.columns}
    spellings = {name: (name, *_ALSO.get(name, ())) for name in SCAN_COLUMNS}
    names = {name: lower[next(filter(lower.get, s))] for name, s in spellings.items() if any(map(lower.get, s))}
    refuse(table.path, _column_problems(table.columns, names), "rename the column; every other one is a covariate")
    if not table.rows:
        raise UserError(f"the table {table.path} has no row below its header", "add one row per scan")
    problems, scans = [], []
    for row in table.rows:
        values = {wanted: row.values.get(name) for wanted, name in names.items()}
        problems += [f"line {row.line}: {text}" for text in _row_problems(values)]
        file = Path(values.get("path") or "").expanduser()
        covariates = {key: value for key, value in row.values.items() if key not in names.values()}
        scans.append(
            ListedScan(
                table.path.parent / file, values.get("subject"), values.get("session"), values.get("split"), covariates
            )
        )
    refuse(table.path, problems, "correct these rows")
    if not any(scan.path.exists() for scan in scans):
        raise UserError(
            f"none of the {len(scans)} files listed in {table.path} exists, the first would be {scans[0].path}",
            "paths are absolute, or relative to the folder of the table",
        )
    return scans


def describe_columns(
    rows: Mapping[str, Mapping[str, str]], declared_classes: Iterable[str] = ()
) -> dict[str, dict[str, Any]]:
    """What each covariate holds: a number where every value is one, else a class.

    Args:
        rows: scan -> covariate -> value, missing ones left out.
        declared_classes: columns whose numbers are codes (`Levels` of participants.json).

    Returns:
        Column -> {"type": "number", "missing", "minimum", "mean", "maximum"} or
        {"type": "class", "missing", "counts": value -> how many}.
    """
    declared = set(declared_classes)
    described = {}
    for name in sorted({name for values in rows.values() for name in values}):
        present = [values[name] for values in rows.values() if name in values]
        numbers = [] if name in declared else [n for value in present if (n := _number(value)) is not None]
        entry: dict[str, Any] = {"type": "class", "missing": len(rows) - len(present)}
        if len(numbers) == len(present):
            entry |= {"type": "number", "minimum": min(numbers), "maximum": max(numbers)}
            entry["mean"] = math.fsum(numbers) / len(numbers)
        else:
            entry["counts"] = dict(sorted(Counter(present).items()))
        described[name] = entry
    return described


def typed(values: Mapping[str, str], columns: Mapping[str, Mapping[str, Any]]) -> dict[str, float | str | None]:
    """One scan's value of every described column: number, class name, or None where it is missing."""
    return {
        name: None if name not in values else _number(values[name]) if c["type"] == "number" else values[name]
        for name, c in columns.items()
    }


def refuse(path: Path, problems: Sequence[str], hint: str) -> None:
    """Raise if there is a problem, with the first few of them.

    Raises:
        UserError: `problems` is not empty.
    """
    if problems:
        more = f"\n  and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise UserError(f"{path}:\n  " + "\n  ".join(problems[:_LISTED]) + more, hint)


def _delimiter(path: Path, header: str) -> str:
    if path.suffix.lower() == ".tsv":
        return "\t"
    return ";" if ";" in header and "," not in header else ","


def _column_problems(columns: Sequence[str], names: Mapping[str, str]) -> list[str]:
    problems = []
    for wanted in (name for name in SCAN_COLUMNS if name not in names):
        # Of about the same length: 'subject_age' is a covariate, 'subjct' is a slip.
        alike = [column.lower() for column in columns if abs(len(column) - len(wanted)) <= 2]
        near = difflib.get_close_matches(wanted, alike, n=1, cutoff=_NEAR)
        if near:
            problems.append(f"unknown column '{near[0]}': did you mean '{wanted}'?")
    if "path" not in names and not any("'path'?" in text for text in problems):
        problems.append(f"no column 'path', which names the files; its columns: {', '.join(columns)}")
    if "session" in names and "subject" not in names and not problems:
        problems.append("a column 'session' without a column 'subject'")
    return problems


def _row_problems(values: Mapping[str, str | None]) -> list[str]:
    problems = [f"no {name}" for name in ("path", "subject", "split") if name in values and not values[name]]
    split = values.get("split")
    if split and split not in SPLITS:
        near = difflib.get_close_matches(split, SPLITS, n=1, cutoff=0.4)
        suggestion = f" (did you mean '{near[0]}'?)" if near else ""
        problems.append(f"no split '{split}'{suggestion}; there are {', '.join(SPLITS)}")
    return problems


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
