"""Which scans there are: files, folders, globs, tables and BIDS trees become checked `Scan` records.

A latent is named after its scan (`sub-01_ses-02_T1w`), the split goes by participant (`sub-01`): two scans of
one person never lie in two splits.
"""

from __future__ import annotations

import glob
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from neuromf.data.bids import BidsTree, Selection, is_bids, nifti_below, parse_name, read_bids, root_above
from neuromf.data.tables import TABLE_SUFFIXES, ListedScan, read_scan_table, read_table
from neuromf.data.volumes import NIFTI_SUFFIXES, nifti_stem
from neuromf.errors import UserError, did_you_mean

_ID_COLUMNS = ("subject", "id", "participant_id")
_WHAT_TO_GIVE = "give NIfTI files, a folder, a BIDS dataset, a .csv or .tsv table, or a glob in quotes"


class Fault(NamedTuple):
    """Why a scan cannot be used whatever its file holds, and what to do."""

    reason: str
    hint: str


@dataclass(frozen=True)
class Scan:
    """One input volume.

    Attributes:
        subject: the name of its latent: unique, usable as a file name.
        path: where the file lies.
        participant: who was scanned; all scans of one participant go to one split.
        split: train, val or test where the input says so.
        covariates: column -> value as text; missing ones are left out.
        fault: of its name; the scan is then reported and left out.
    """

    subject: str
    path: Path
    participant: str = ""
    split: str | None = None
    covariates: dict[str, str] = field(default_factory=dict, hash=False)
    fault: Fault | None = None

    def __post_init__(self) -> None:
        check_subject(self.subject)
        object.__setattr__(self, "participant", self.participant or self.subject)


class TableMatch(NamedTuple):
    """How a table of people or scans fits the scans: who is listed without a scan (`absent`), and the reverse."""

    path: Path
    columns: list[str]
    absent: list[str]
    unlisted: list[str]


class Sources(NamedTuple):
    """All that was found behind the inputs.

    Attributes:
        scans: sorted by subject.
        tables: where covariates came from.
        coded: columns whose numbers are codes for classes.
        overlooked: NIfTI files in BIDS trees that are not named by its rules.
        trees: the BIDS trees among the inputs.
    """

    scans: list[Scan]
    tables: tuple[TableMatch, ...] = ()
    coded: frozenset[str] = frozenset()
    overlooked: tuple[Path, ...] = ()
    trees: tuple[Path, ...] = ()


def find_scans(inputs: Sequence[str | Path], selection: Selection | None = None) -> list[Scan]:
    """The scans of `find_sources`, without the rest."""
    return find_sources(inputs, selection).scans


def find_sources(inputs: Sequence[str | Path], selection: Selection | None = None) -> Sources:
    """List the scans behind files, folders (with all that lies below), globs, tables and BIDS trees.

    The name of a scan is its file's stem, or in a table `subject` with `session`. A folder with
    dataset_description.json is a BIDS tree, also below another folder; so is a folder in one. A file reached twice
    counts once. Files with one name, or one that no latent could have, are marked as faulty.

    Raises:
        UserError: nothing found, only faulty names, a faulty table, or splits that divide a participant.
    """
    if not inputs:
        raise UserError("no input was given", _WHAT_TO_GIVE)
    parts = [part for entry in inputs for part in _expand(entry, selection or Selection())]
    by_path: dict[Path, Scan] = {}
    for scan in (scan for part in parts for scan in part.scans):
        known = by_path.setdefault(scan.path.absolute(), scan)
        if known.subject != scan.subject:
            raise UserError(
                f"{scan.path} is given twice, as '{known.subject}' and as '{scan.subject}'", "name each file once"
            )
    scans = _told_apart(sorted(by_path.values(), key=lambda scan: scan.subject))
    _check_splits(scans)
    return Sources(
        scans,
        _merged(table for part in parts for table in part.tables),
        frozenset().union(*(part.coded for part in parts)),
        tuple(path for part in parts for path in part.overlooked),
        tuple(root for part in parts for root in part.trees),
    )


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


def join_table(sources: Sources, path: str | Path) -> Sources:
    """Add the columns of a table as covariates; they win over those a scan has already.

    The id column is the one called subject, id or participant_id, else the first. It names scans (a `.nii.gz` in
    it is ignored) or participants, with or without `sub-`.

    Raises:
        UserError: a faulty table, an id listed twice, or no id that fits a scan.
    """
    table = read_table(path)
    column = next((name for name in _ID_COLUMNS if name in table.columns), table.columns[0])
    rows: dict[str, dict[str, str]] = {}
    for row in table.rows:
        name = nifti_stem(row.values.get(column, ""))
        values = {key: value for key, value in row.values.items() if key != column}
        if rows.setdefault(name, values) != values:
            raise UserError(
                f"{table.path}, line {row.line}: '{name}' is listed before with other values",
                f"each id of the column '{column}' needs one row",
            )
    scans, unlisted, used = [], [], set()
    for scan in sources.scans:
        keys = (scan.subject, scan.participant, scan.participant.removeprefix("sub-"))
        key = next((key for key in keys if key in rows), None)
        if key is None:
            unlisted.append(scan.subject)
        used.add(key)
        extra = rows[key] if key is not None else {}
        scans.append(replace(scan, covariates=scan.covariates | extra))
    if len(unlisted) == len(scans):
        raise UserError(
            f"no id in the column '{column}' of {table.path} is one of the {len(scans)} scans, such as"
            f" '{scans[0].subject}'",
            "ids are file names without .nii.gz, or participants; their column is subject, id, participant_id or the"
            " first",
        )
    match = TableMatch(table.path, table.columns, [name for name in rows if name not in used], unlisted)
    return sources._replace(scans=scans, tables=(*sources.tables, match))


def read_column(sources: Sources, column: str) -> dict[str, str]:
    """The value of one covariate for every scan, by subject.

    Raises:
        UserError: no such column, or a scan without a value.
    """
    known = dict.fromkeys(name for scan in sources.scans for name in scan.covariates)
    known |= dict.fromkeys(name for table in sources.tables for name in table.columns)
    tables = " and ".join(str(table.path) for table in sources.tables)
    if not known:
        raise UserError(
            f"the column '{column}' needs its table",
            "give both, for instance --groups subjects.csv --group-column scan_group",
        )
    if column not in known:
        raise UserError(f"{tables or 'the input'} has no column '{column}'", did_you_mean(column, known))
    missing = [scan.subject for scan in sources.scans if column not in scan.covariates]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(sources.scans)} subjects have no '{column}' in {tables}: {some(missing)}",
            "add a row or a value for each; ids are scans (file names without .nii.gz) or participants",
        )
    return {scan.subject: scan.covariates[column] for scan in sources.scans}


def read_groups(sources: Sources, column: str | None) -> dict[str, str]:
    """What must stay in one split: subject -> participant, or the value of a column that divides no participant.

    Raises:
        UserError: see `read_column`; or two scans of one participant in two groups.
    """
    if column is None:
        return {scan.subject: scan.participant for scan in sources.scans}
    groups = read_column(sources, column)
    first: dict[str, str] = {}
    for scan in sources.scans:
        other = first.setdefault(scan.participant, scan.subject)
        if groups[other] != groups[scan.subject]:
            raise UserError(
                f"the column '{column}' divides '{scan.participant}': {other} is in {groups[other]},"
                f" {scan.subject} in {groups[scan.subject]}",
                "name a column with the same value for all scans of a participant",
            )
    return groups


def some(names: Sequence[str], limit: int = 5) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _expand(entry: str | Path, selection: Selection) -> list[Sources]:
    """What one word of the command line stands for."""
    path = Path(entry)
    if path.is_dir():
        return _in_folder(path, selection)
    if path.suffix.lower() in TABLE_SUFFIXES and path.is_file():
        return [_from_table(path, read_scan_table(path))]
    if path.exists() or path.is_symlink():
        return [Sources([_plain(path)])]
    if any(character in str(entry) for character in "*?["):
        matches = [Path(match) for match in glob.glob(str(entry), recursive=True)]  # noqa: PTH207 (absolute patterns)
        found = [_plain(path) for path in sorted(matches) if _is_nifti(path) and not path.is_dir()]
        folders = [match for match in sorted(matches) if match.is_dir()]
        if found:
            return [Sources(found)]
        if not folders:
            there = f"; it matches {len(matches)} other files" if matches else ""
            raise UserError(f"no NIfTI file matches '{entry}'{there}", "quote the pattern and check the folder")
        return [part for folder in folders for part in _in_folder(folder, selection)]
    raise UserError(f"{entry} does not exist", _WHAT_TO_GIVE)


def _in_folder(folder: Path, selection: Selection) -> list[Sources]:
    """A BIDS tree, or a folder with all that lies below: NIfTI files, and BIDS trees as such."""
    if is_bids(folder):
        return [_from_bids(read_bids(folder, selection))]
    if root := root_above(folder.absolute()):
        return [_from_bids(read_bids(root, selection, folder.absolute()))]
    files = list(nifti_below(folder))
    roots = sorted(filter(is_bids, {parent for path in files for parent in path.parents if folder in parent.parents}))
    # The outermost: what a tree holds as derivatives is left out as everywhere.
    roots = [root for root in roots if not any(other in root.parents for other in roots)]
    plain = [_plain(path) for path in sorted(files) if not any(root in path.parents for root in roots)]
    if not plain and not roots:
        raise UserError(
            f"{folder} holds no NIfTI file (.nii or .nii.gz), nor does any folder below",
            "check the folder; dcm2niix makes NIfTI files of DICOM",
        )
    trees = [read_bids(root, selection) for root in roots]
    suffixes = sorted({scan.name.suffix for tree in trees for scan in tree.scans})
    if len(suffixes) > 1 and not selection.suffixes:
        raise UserError(
            f"the BIDS datasets in {folder} hold different kinds of scans: {', '.join(suffixes)}",
            f"say which with --suffix, for instance --suffix {suffixes[0]}",
        )
    return [Sources(plain), *map(_from_bids, trees)]


def _plain(path: Path) -> Scan:
    """A file on its own: a name by the rules of BIDS still says who it shows."""
    name, subject, fault = parse_name(path.name), nifti_stem(path), None
    try:
        check_subject(subject)
    except UserError as error:
        subject, fault = re.sub(r"[^\w.-]", "_", subject).lstrip(".-")[:50] or "_", Fault(error.message, error.hint)
    return Scan(subject, path, f"sub-{name.entities['sub']}" if name else "", fault=fault)


def _from_bids(tree: BidsTree) -> Sources:
    """Entities and suffix become covariates beside those of the tables, so that any of them can be a class."""
    scans = []
    for scan in tree.scans:
        said = {key: label for key, label in scan.name.entities.items() if key != "sub"} | {"suffix": scan.name.suffix}
        person = f"sub-{scan.name.entities['sub']}"
        scans.append(Scan(nifti_stem(scan.path), scan.path, person, covariates=said | scan.covariates))
    table = tree.participants
    matches = (TableMatch(table.path, table.columns, tree.absent, tree.unlisted),) if table else ()
    return Sources(scans, matches, tree.coded, tuple(tree.overlooked), (tree.root,))


def _from_table(path: Path, listed: Iterable[ListedScan]) -> Sources:
    scans = []
    for row in listed:
        plain = _plain(row.path) if row.subject is None else None
        session = f"_ses-{row.session.removeprefix('ses-')}" if row.session else ""
        name, participant = (plain.subject, plain.participant) if plain else (f"{row.subject}{session}", row.subject)
        scans.append(Scan(name, row.path, participant or "", row.split, row.covariates))
    columns = list(dict.fromkeys(key for scan in scans for key in scan.covariates))
    return Sources(scans, (TableMatch(path, columns, [], []),))


def _merged(tables: Iterable[TableMatch]) -> tuple[TableMatch, ...]:
    """Each table once: several folders of a BIDS tree share its participants.tsv."""
    by_path: dict[Path, TableMatch] = {}
    for table in tables:
        known = by_path.get(table.path, table._replace(absent=[], unlisted=[]))
        absent, unlisted = (dict.fromkeys(a + b) for a, b in zip(known[2:], table[2:], strict=True))
        by_path[table.path] = known._replace(absent=[*absent], unlisted=[*unlisted])
    return tuple(by_path.values())


def _told_apart(scans: Sequence[Scan]) -> list[Scan]:
    """The scans, those of one name marked as faulty: which of them is meant cannot be known."""
    same: dict[str, list[Scan]] = defaultdict(list)
    for scan in scans:
        if scan.fault is None:
            # Some file systems do not tell "A.pt" from "a.pt".
            same[scan.subject.casefold()].append(scan)
    marked = []
    for scan in scans:
        files = [other.path for other in same[scan.subject.casefold()]]
        if scan.fault is None and len(files) > 1:
            fault = Fault(
                f"two files have the subject id '{scan.subject}': {files[0]} and {files[1]}",
                "the id is the file name without .nii.gz: rename one, give one of the two folders only, or give a"
                " table with the columns path, subject and session (whatever tells a subject's scans apart)",
            )
            scan = replace(scan, fault=fault)
        marked.append(scan)
    if marked[0].fault and all(scan.fault for scan in marked):
        raise UserError(*marked[0].fault)
    return marked


def _check_splits(scans: Sequence[Scan]) -> None:
    without = [scan.subject for scan in scans if scan.split is None]
    if without and len(without) < len(scans):
        raise UserError(
            f"{len(without)} of {len(scans)} scans have no split: {some(without)}", "give a split to all, or to none"
        )
    splits: dict[str, Scan] = {}
    for scan in scans:
        other = splits.setdefault(scan.participant, scan)
        if other.split != scan.split:
            raise UserError(
                f"the scans of '{scan.participant}' are in two splits: {other.subject} in {other.split},"
                f" {scan.subject} in {scan.split}",
                "all scans of one subject belong to one split: the model would be tested on whom it has seen",
            )


def _is_nifti(path: Path) -> bool:
    """By name; hidden files (such as the `._x.nii.gz` that macOS leaves) are none."""
    return path.name.lower().endswith(NIFTI_SUFFIXES) and not path.name.startswith(".")
