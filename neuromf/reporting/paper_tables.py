"""Tables as a paper takes them: CSV for programs, Markdown for a page, LaTeX with booktabs for the manuscript."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from neuromf.files import write_text
from neuromf.reporting.tables import csv_table, format_number, markdown_table

Record = Mapping[str, Any]

_ESCAPED = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip


class TableFiles(NamedTuple):
    """Where a table was written, in its three forms."""

    csv: Path
    markdown: Path
    latex: Path


def write_table(
    folder: str | Path, name: str, rows: Sequence[Record], caption: str, columns: Sequence[str] | None = None
) -> TableFiles:
    """Write `<name>.csv`, `.md` and `.tex`; the caption is in the last two.

    Args:
        folder: made if absent.
        name: of the files, and of the LaTeX label `tab:<name>`.
        rows: records; keys are the column heads, absent values stay empty.
        caption: plain text.
        columns: which keys, in which order; all of them, in order of appearance, when None.
    """
    files = TableFiles(*(Path(folder) / f"{name}.{kind}" for kind in ("csv", "md", "tex")))
    write_text(files.csv, csv_table(rows, columns))
    write_text(files.markdown, f"{caption}\n\n{markdown_table(rows, columns)}\n")
    write_text(files.latex, latex_table(rows, columns, caption=caption, label=f"tab:{name}"))
    return files


def latex_table(
    rows: Sequence[Record], columns: Sequence[str] | None = None, *, caption: str = "", label: str = ""
) -> str:
    r"""A `table` float with booktabs' rules (`\usepackage{booktabs}`); columns of numbers are right-aligned.

    Args:
        rows: records; keys are the column heads.
        columns: which keys, in which order.
        caption: plain text; escaped, as everything is.
        label: for `\ref`.
    """
    heads = list(columns) if columns is not None else list(dict.fromkeys(key for row in rows for key in row))
    aligned = "".join("r" if _numbers([row.get(head) for row in rows]) else "l" for head in heads)
    lines = [r"\begin{table}", r"\centering"]
    lines += [rf"\caption{{{escape(caption)}}}"] if caption else []
    lines += [rf"\label{{{label}}}"] if label else []
    lines += [rf"\begin{{tabular}}{{{aligned}}}", r"\toprule", _line(heads), r"\midrule"]
    lines += [_line([_cell(row.get(head)) for head in heads]) for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def escape(text: str) -> str:
    r"""Plain text for LaTeX.

    Example:
        >>> print(escape("50 % of lp_2"))
        50 \% of lp\_2
    """
    return "".join(_ESCAPED.get(character, character) for character in text)


def interval_text(value: float, low: float | None, high: float | None) -> str:
    """A number with its interval, as in `0.12 [0.1, 0.14]`; alone where it has none."""
    if low is None or high is None or low != low or high != high:  # NaN is not equal to itself
        return format_number(value)
    return f"{format_number(value)} [{format_number(low)}, {format_number(high)}]"


def p_text(p: float) -> str:
    """A p-value as journals print it.

    Example:
        >>> p_text(0.03361), p_text(2e-5)
        ('0.034', '<0.001')
    """
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _line(cells: Sequence[str]) -> str:
    return " & ".join(escape(cell) for cell in cells) + r" \\"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return format_number(value) if isinstance(value, float) else str(value)


def _numbers(values: Sequence[Any]) -> bool:
    """Whether a column is one of numbers, be they written with an interval or as `<0.001`."""
    present = [value for value in values if value not in (None, "")]
    return bool(present) and all(
        (isinstance(v, int | float) and not isinstance(v, bool)) or (isinstance(v, str) and re.match(r"<?-?\d", v))
        for v in present
    )
