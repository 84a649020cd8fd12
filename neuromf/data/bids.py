"""BIDS trees: which scans there are, what their names say, and what participants.tsv knows of them.

What is read of the standard (bids-specification.readthedocs.io, 1.10): a dataset is a folder with
dataset_description.json; scans are `sub-<label>/[ses-<label>/]<datatype>/<entities>_<suffix>.nii[.gz]`;
entities are `key-label` joined by `_`, and repeat the labels of the folders. `derivatives`, `sourcedata` and
`code` lie beside the `sub-` folders and are never entered; a derivative is a dataset of its own, named as one.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from neuromf.data.tables import Table, read_table, refuse
from neuromf.data.volumes import NIFTI_SUFFIXES, nifti_stem
from neuromf.errors import UserError, did_you_mean
from neuromf.files import read_json

DESCRIPTION_FILE = "dataset_description.json"
PARTICIPANTS_FILE = "participants.tsv"
# The value of an entity that a name does not have, in `Selection.entities`.
ABSENT = "none"

_INDICES = ("run", "echo", "flip", "inv", "split", "chunk")
_ENTITY = re.compile(r"([a-zA-Z0-9]+)-([a-zA-Z0-9+]+)")


@dataclass(frozen=True)
class Selection:
    """Which scans of a BIDS tree are wanted.

    Attributes:
        suffixes: such as T1w; empty takes the only one among the anatomical scans.
        entities: entity -> allowed labels; "none" stands for names without that entity.
    """

    suffixes: tuple[str, ...] = ()
    entities: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        return {"suffixes": list(self.suffixes), "entities": {k: list(v) for k, v in sorted(self.entities.items())}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> Selection:
        """The selection stored by `to_dict`; None selects everything."""
        values = values or {}
        entities = {key: tuple(labels) for key, labels in values.get("entities", {}).items()}
        return cls(tuple(values.get("suffixes", ())), entities)


class BidsName(NamedTuple):
    """What a file name says: entities in their order (`sub` first), and the suffix (T1w)."""

    entities: dict[str, str]
    suffix: str


class BidsScan(NamedTuple):
    """One NIfTI file of a BIDS tree; `covariates` as participants.tsv and sessions.tsv have them."""

    path: Path
    name: BidsName
    covariates: dict[str, str]


class BidsTree(NamedTuple):
    """What was selected from a tree.

    Attributes:
        participants: participants.tsv, None without one.
        absent: participants listed there without a selected scan; unlisted: the other way round.
        coded: columns whose numbers are codes, by participants.json.
        overlooked: NIfTI files below `sub-` folders whose names or places are none of BIDS.
    """

    root: Path
    scans: list[BidsScan]
    participants: Table | None
    absent: list[str]
    unlisted: list[str]
    coded: frozenset[str]
    overlooked: list[Path]


def is_bids(folder: Path) -> bool:
    """Whether a folder is the root of a BIDS dataset."""
    return (folder / DESCRIPTION_FILE).is_file()


def root_above(folder: Path) -> Path | None:
    """The dataset that a `sub-` folder, or a folder in one, belongs to; None where there is none.

    Folders of `derivatives` and `sourcedata` belong to none: they are taken as they are.
    """
    parents = folder.parents
    for depth, root in enumerate(parents[:3]):
        subject = folder if depth == 0 else parents[depth - 1]
        if is_bids(root) and subject.name.startswith("sub-"):
            return root
    return None


def parse_name(name: str) -> BidsName | None:
    """Read a file name by the rules of BIDS; None if it does not follow them.

    Example:
        >>> parse_name("sub-01_ses-02_run-1_T1w.nii.gz")
        BidsName(entities={'sub': '01', 'ses': '02', 'run': '1'}, suffix='T1w')
    """
    *pairs, suffix = nifti_stem(name).split("_")
    found = [_ENTITY.fullmatch(pair) for pair in pairs]
    entities = {match[1]: match[2] for match in found if match}
    if not pairs or len(entities) < len(pairs) or next(iter(entities)) != "sub" or not suffix.isalnum():
        return None
    return BidsName(entities, suffix)


def read_bids(root: Path, selection: Selection, below: Path | None = None) -> BidsTree:
    """List the selected scans of a tree, or of what lies below one of its folders, with their covariates.

    Raises:
        UserError: no scan at all, none with a wanted suffix or entity (what there is, is said), several
            anatomical suffixes and none named, or a faulty participants.tsv.
    """
    folders = [below] if below else [folder for folder in root.glob("sub-*") if folder.is_dir()]
    files = sorted(path for folder in folders for path in nifti_below(folder))
    named = [(path, name) for path in files if (name := _placed(root, path)) is not None]
    if not named:
        raise UserError(
            f"the BIDS dataset {below or root} has no scan"
            + (f": {len(files)} NIfTI files are not named by its rules, such as {files[0]}" if files else ""),
            "scans are sub-<label>/[ses-<label>/]anat/sub-<label>_[ses-<label>_]T1w.nii.gz",
        )
    chosen = _with_entities(root, _with_suffix(root, named, selection.suffixes), selection.entities)
    participants, coded = _participants(root)
    known = {row.values["participant_id"]: row.values for row in participants.rows} if participants else {}
    sessions: dict[str, dict[str, dict[str, str]]] = {}
    scans = []
    for path, name in chosen:
        person = f"sub-{name.entities['sub']}"
        if "ses" in name.entities and person not in sessions:
            sessions[person] = _sessions(root, person)
        own = known.get(person, {}) | sessions.get(person, {}).get(name.entities.get("ses", ""), {})
        scans.append(BidsScan(path, name, {k: v for k, v in own.items() if k not in ("participant_id", "session_id")}))
    people = dict.fromkeys(f"sub-{name.entities['sub']}" for _, name in chosen)
    everybody = below is None and "sub" not in selection.entities
    absent = [person for person in known if person not in people and everybody]
    unlisted = [person for person in people if person not in known] if participants else []
    named_paths = {path for path, _ in named}
    return BidsTree(root, scans, participants, absent, unlisted, coded, [p for p in files if p not in named_paths])


def nifti_below(folder: Path) -> Iterator[Path]:
    """NIfTI files at any depth, by name: links too, even broken ones, so that they are reported and not overlooked.

    Hidden files and folders are passed over (such as `._x.nii.gz`, which macOS leaves); a folder that is
    reached twice, through links, is read once.
    """
    seen: set[Path] = set()
    waiting = [(folder, folder.resolve())]
    while waiting:
        here, real = waiting.pop()
        if real in seen:
            continue
        seen.add(real)
        try:
            entries = sorted(os.scandir(here), key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            raise UserError(f"cannot read the folder {here}: {error.strerror}", "check its rights") from error
        for entry in entries:
            path = here / entry.name
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                # Only links are resolved: that is a system call for each part of a path.
                waiting.append((path, path.resolve() if entry.is_symlink() else real / entry.name))
            elif entry.name.lower().endswith(NIFTI_SUFFIXES):
                yield path


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def _placed(root: Path, path: Path) -> BidsName | None:
    """The name of a file that lies where its entities say, `sub-X/[ses-Y/]datatype/`, else None."""
    name = parse_name(path.name)
    if name is None:
        return None
    expected = [f"{key}-{name.entities[key]}" for key in ("sub", "ses") if key in name.entities]
    *folders, datatype = path.relative_to(root).parent.parts
    return name if folders == expected and datatype.isalnum() else None


def _with_suffix(
    root: Path, named: list[tuple[Path, BidsName]], suffixes: Iterable[str]
) -> list[tuple[Path, BidsName]]:
    counts = Counter(name.suffix for _, name in named)
    there = ", ".join(f"{suffix} ({n})" for suffix, n in counts.most_common())
    wanted = tuple(suffixes)
    if not wanted:
        anatomical = sorted({name.suffix for path, name in named if path.parent.name == "anat"} or counts)
        if len(anatomical) > 1:
            first = max(anatomical, key=lambda suffix: counts[suffix])
            raise UserError(
                f"the BIDS dataset {root} has several kinds of scans: {there}",
                f"say which with --suffix, for instance --suffix {first}",
            )
        wanted = (anatomical[0],)
    for suffix in wanted:
        if suffix not in counts:
            nearest = did_you_mean(suffix, counts) if len(counts) > 1 else f"give --suffix {next(iter(counts))}"
            raise UserError(f"the BIDS dataset {root} has no scan with the suffix '{suffix}'; it has {there}", nearest)
    return [(path, name) for path, name in named if name.suffix in wanted]


def _with_entities(
    root: Path, named: list[tuple[Path, BidsName]], wanted: Mapping[str, Iterable[str]]
) -> list[tuple[Path, BidsName]]:
    for key, labels in wanted.items():
        keys = list(dict.fromkeys(key for _, name in named for key in name.entities))
        if key not in keys:
            raise UserError(f"no selected scan of {root} has the entity '{key}'", did_you_mean(key, keys))
        allowed = {_label(key, label) for label in labels}
        kept = [(path, name) for path, name in named if _label(key, name.entities.get(key, ABSENT)) in allowed]
        if not kept:
            counts = Counter(name.entities.get(key, ABSENT) for _, name in named)
            there = ", ".join(f"{label} ({n})" for label, n in islice(sorted(counts.items()), 20))
            raise UserError(f"no selected scan of {root} has {key}={' or '.join(labels)}", f"{key} is there: {there}")
        named = kept
    return named


def _label(key: str, label: str) -> str:
    """An index without its leading zeros (run-1 is run-01), any other label without a repeated key."""
    label = label.removeprefix(f"{key}-")
    return str(int(label)) if key in _INDICES and label.isdecimal() else label


def _participants(root: Path) -> tuple[Table | None, frozenset[str]]:
    """participants.tsv with its ids as `sub-<label>`, and the columns whose numbers are codes.

    A derivative without one takes that of the dataset it lies in.
    """
    homes = [root, *(parent for parent in list(root.absolute().parents)[:3] if is_bids(parent))]
    home = next((folder for folder in homes if (folder / PARTICIPANTS_FILE).is_file()), None)
    if home is None:
        return None, frozenset()
    table = _with_ids(read_table(home / PARTICIPANTS_FILE), "participant_id", "sub-")
    described = home / "participants.json"
    columns = read_json(described) if described.is_file() else {}
    if not isinstance(columns, Mapping):
        raise UserError(f"{described} does not describe columns", "BIDS: one JSON object, column -> description")
    return table, frozenset(k for k, v in columns.items() if isinstance(v, Mapping) and v.get("Levels"))


def _sessions(root: Path, person: str) -> dict[str, dict[str, str]]:
    """Session label -> values, of `sub-X/sub-X_sessions.tsv`; empty without one."""
    path = root / person / f"{person}_sessions.tsv"
    if not path.is_file():
        return {}
    rows = _with_ids(read_table(path), "session_id", "ses-").rows
    return {row.values["session_id"].removeprefix("ses-"): row.values for row in rows}


def _with_ids(table: Table, column: str, prefix: str) -> Table:
    """The table with every id there, once, and with its prefix."""
    if column not in table.columns:
        near = did_you_mean(column, table.columns)
        raise UserError(f"{table.path} has no column '{column}', which BIDS asks for", near)
    counts = Counter(row.values.get(column, "") for row in table.rows)
    problems = [
        f"'{name}' is listed {n} times" if name else f"{n} rows without one"
        for name, n in counts.items()
        if n > 1 or not name
    ]
    refuse(table.path, problems, f"each row needs a {column} of its own")
    rows = [
        row._replace(values=row.values | {column: prefix + row.values[column].removeprefix(prefix)})
        for row in table.rows
    ]
    return table._replace(rows=rows)
