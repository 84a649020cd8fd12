"""Records to tables: Markdown for people, CSV for programs."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neuromf.files import write_text

Record = Mapping[str, Any]


def markdown_table(rows: Sequence[Record], columns: Sequence[str] | None = None) -> str:
    """A Markdown table with one line per record; numbers are right-aligned, absent values are empty.

    Args:
        rows: records; keys are the column heads.
        columns: which keys, in which order; every key in order of appearance when None.

    Example:
        >>> print(markdown_table([{"set": "real", "N": 64}]))
        | set | N |
        | --- | ---: |
        | real | 64 |
    """
    columns = _columns(rows, columns)
    numeric = [_is_numeric(row.get(c) for row in rows) for c in columns]
    lines = [list(columns), ["---:" if n else "---" for n in numeric]]
    lines += [[_cell(row.get(c)) for c in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def csv_table(rows: Sequence[Record], columns: Sequence[str] | None = None) -> str:
    """The same records as CSV with a header line; numbers in full precision."""
    columns = _columns(rows, columns)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(["" if row.get(c) is None else row.get(c) for c in columns] for row in rows)
    return buffer.getvalue()


def write_csv(rows: Sequence[Record], path: str | Path, columns: Sequence[str] | None = None) -> None:
    """Write `csv_table` atomically."""
    write_text(path, csv_table(rows, columns))


def format_number(value: float, digits: int = 4) -> str:
    """A number as people read it: `digits` significant digits, no exponent between 0.001 and 100000.

    Example:
        >>> format_number(0.0123456), format_number(1234.5), format_number(12)
        ('0.01235', '1234', '12')
    """
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    if not 1e-3 <= abs(value) < 1e5:  # also 0, NaN and Inf
        return f"{value:.{digits - 1}g}"
    decimals = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
    return f"{value:.{decimals}f}"


def _columns(rows: Sequence[Record], columns: Sequence[str] | None) -> list[str]:
    return list(columns) if columns is not None else list(dict.fromkeys(key for row in rows for key in row))


def _is_numeric(values: Any) -> bool:
    present = [v for v in values if v is not None]
    return bool(present) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in present)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = format_number(value) if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
