"""Which scans there are: files, folders and globs become (subject, path) pairs with checked ids.

BIDS trees and CSV/TSV lists get a function each beside `_expand`, chosen there; everything after it only
sees `Scan` records.
"""

from __future__ import annotations

import csv
import glob
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from neuromf.data.volumes import NIFTI_SUFFIXES, nifti_stem
from neuromf.errors import UserError

_ID_COLUMNS = ("subject", "id", "participant_id")


class Scan(NamedTuple):
    """One input volume: the subject's id (checked, usable as a file name) and where the file lies."""

    subject: str
    path: Path


def find_scans(inputs: Sequence[str | Path]) -> list[Scan]:
    """List the scans behind files, folders and globs, sorted by subject; the id is the file's stem.

    A folder gives the NIfTI files directly in it (`folder/**/*.nii.gz` reaches below). A file reached twice
    counts once.

    Raises:
        UserError: nothing found, an unusable id, or two files with one id.
    """
    paths = {path.absolute(): path for entry in inputs for path in _expand(entry)}
    if not paths:
        raise UserError("no input was given", "name NIfTI files, a folder, or a glob in quotes")
    scans = sorted(Scan(check_subject(nifti_stem(path)), path) for path in paths.values())
    seen: dict[str, Scan] = {}
    for scan in scans:
        # Some file systems do not tell "A.pt" from "a.pt".
        other = seen.setdefault(scan.subject.casefold(), scan)
        if other is not scan:
            raise UserError(
                f"two files have the subject id '{scan.subject}': {other.path} and {scan.path}",
                "rename one of them, or give only one: the id is the file name without .nii.gz",
            )
    return scans


def check_subject(subject: str) -> str:
    """Return `subject` if it is safe as a file name, so that no id can reach outside a folder.

    Raises:
        UserError: empty, too long, a separator or control character in it, or a leading dot or dash.
    """
    unsafe = (
        not subject
        or len(subject.encode("utf-8", "replace")) > 200
        or subject[0] in ".-"
        or not subject.isprintable()
        or any(character in '/\\:*?"<>|' for character in subject)
    )
    if unsafe:
        raise UserError(
            f"the subject id {subject!r} cannot be a file name",
            "use letters, digits, '_', '-' and '.', starting with a letter or digit",
        )
    return subject


def read_groups(table: Path, column: str, subjects: Iterable[str]) -> dict[str, str]:
    """Read which subjects belong together (same person, same scan) from a CSV or TSV.

    The id column is the one called subject, id or participant_id, else the first; a `.nii.gz` in it is ignored.

    Returns:
        Subject -> group, for each of `subjects`.

    Raises:
        UserError: no such table or column, or a subject without a group.
    """
    try:
        with table.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle, delimiter="\t" if table.suffix == ".tsv" else ",")
            columns = list(reader.fieldnames or [])
            if column not in columns:
                raise UserError(f"{table} has no column '{column}'", f"its columns: {', '.join(columns) or 'none'}")
            id_column = next((name for name in _ID_COLUMNS if name in columns), columns[0])
            groups = {nifti_stem(row[id_column] or ""): (row[column] or "").strip() for row in reader}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the group table {table}: {error}") from error
    subjects = list(subjects)
    missing = [subject for subject in subjects if not groups.get(subject)]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(subjects)} subjects have no '{column}' in {table}: {_some(missing)}",
            f"add a row for each to {table.name} (ids are compared with its column '{id_column}')",
        )
    return {subject: groups[subject] for subject in subjects}


def _expand(entry: str | Path) -> list[Path]:
    """The files one command-line word stands for; a BIDS root or a table would be recognised here."""
    path = Path(entry)
    if path.is_dir():
        return _in_folder(path)
    if path.exists():
        return [path]
    if any(character in str(entry) for character in "*?["):
        matches = [Path(match) for match in glob.glob(str(entry), recursive=True)]  # noqa: PTH207 (absolute patterns)
        found = sorted(match for match in matches if _is_nifti(match) and not match.is_dir())
        if not found:
            raise UserError(f"no NIfTI file matches '{entry}'", "quote the pattern and check the folder")
        return found
    raise UserError(f"{entry} does not exist", "give NIfTI files, a folder, or a glob in quotes")


def _in_folder(folder: Path) -> list[Path]:
    # A broken link is listed too, so that it is reported and not overlooked.
    found = sorted(path for path in folder.iterdir() if _is_nifti(path) and not path.is_dir())
    if found:
        return found
    below = next((path for path in sorted(folder.rglob("*.nii*")) if _is_nifti(path)), None)
    if below is not None:
        raise UserError(
            f"{folder} holds no NIfTI file itself, but {below} lies below it",
            f"to take what lies below: '{folder}/**/*.nii.gz'",
        )
    raise UserError(f"{folder} holds no NIfTI file (.nii or .nii.gz)", "check the folder")


def _is_nifti(path: Path) -> bool:
    """By name; hidden files (such as the `._x.nii.gz` that macOS leaves) are none."""
    return path.name.lower().endswith(NIFTI_SUFFIXES) and not path.name.startswith(".")


def _some(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
