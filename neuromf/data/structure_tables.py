"""Tables of structure volumes as SynthSeg writes them: one row a head, one column a structure, in mm^3.

`mri_synthseg --vol FILE.csv` writes `subject,total intracranial,left cerebral white matter,...`; for a single head the
first cell is empty. FreeSurfer's tables of aseg volumes have the same form, with tabs.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from neuromf.errors import UserError
from neuromf.files import write_text

TOTAL = "total intracranial"
"""A column that is no structure: the room all of them share."""
_MM3_PER_ML = 1000.0
# A head of a child has more than 500 ml of brain; the same number of ml taken for mm^3 would be half a ml.
_LEAST_TOTAL_ML = 50.0


class StructureTable(NamedTuple):
    """Volumes in ml, (N, S), of the structures `names` in the heads `subjects`."""

    subjects: list[str]
    names: list[str]
    ml: np.ndarray

    def columns(self, names: Sequence[str]) -> np.ndarray:
        """(N, len(names))."""
        return self.ml[:, [self.names.index(name) for name in names]]


def read_structure_table(path: str | Path, *, check_unit: bool = True) -> StructureTable:
    """Read a table of volumes in mm^3, with commas or tabs.

    Args:
        path: of the table.
        check_unit: refuse volumes that are too small to be in mm^3.

    Raises:
        UserError: not such a table, a cell that is no volume, two rows of one name, or volumes that are not in mm^3.
    """
    path = Path(path)
    rows = _rows(path)
    if len(rows) < 2 or len(rows[0]) < 2:
        raise UserError(
            f"{path} is no table of volumes", "one row a head, one column a structure, in mm3, as mri_synthseg --vol"
        )
    names = [cell.strip().lower() for cell in rows[0][1:]]
    if twice := _twice(names):
        raise UserError(f"{path} has two columns '{twice}'", "name each structure once")
    subjects = [row[0].strip() for row in rows[1:]]
    if twice := _twice(subjects):
        raise UserError(f"{path} has two rows '{twice}'", "one row for each head")
    values = np.array([_values(path, row, names) for row in rows[1:]]) / _MM3_PER_ML
    typical_ml = float(np.median(values.sum(1)))
    if check_unit and typical_ml < _LEAST_TOTAL_ML:
        raise UserError(
            f"{path}: the structures of a head sum up to {typical_ml * _MM3_PER_ML:g} mm3, which is no brain",
            "volumes in mm3 are wanted; multiply those in ml by 1000",
        )
    return StructureTable(subjects, names, values)


def write_structure_table(path: str | Path, subjects: Iterable[str], names: Sequence[str], ml: np.ndarray) -> None:
    """Write a table that `read_structure_table` reads, in mm^3."""
    lines = [",".join(["subject", *names])]
    for subject, row in zip(subjects, ml, strict=True):
        lines.append(",".join([subject, *(f"{value * _MM3_PER_ML:.3f}" for value in row)]))
    write_text(path, "\n".join(lines) + "\n")


def _rows(path: Path) -> list[list[str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist", "give a table that `mri_synthseg --vol` wrote") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a table", "give a table that `mri_synthseg --vol` wrote") from error
    delimiter = "\t" if "\t" in text.partition("\n")[0] else ","
    return [row for row in csv.reader(text.splitlines(), delimiter=delimiter) if any(cell.strip() for cell in row)]


def _values(path: Path, row: list[str], names: list[str]) -> list[float]:
    if len(row) != len(names) + 1:
        raise UserError(f"{path}: row '{row[0]}' has {len(row) - 1} volumes, and there are {len(names)} columns")
    values = []
    for name, cell in zip(names, row[1:], strict=True):
        try:
            value = float(cell)
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf:
            raise UserError(
                f"{path}: '{cell}' in row '{row[0]}', column '{name}' is no volume", "leave out heads that failed"
            )
        values.append(value)
    return values


def _twice(words: list[str]) -> str | None:
    return next((word for word in words if words.count(word) > 1), None)
