"""What of the catalogue is on this machine, and whether it is as it should be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from neuromf.errors import UserError
from neuromf.weights.catalogue import Entry, entries, find
from neuromf.weights.integrity import Trust
from neuromf.weights.lookup import examine, how_to_get
from neuromf.weights.places import Notes, expected_path, folder, found_path

MIB = 1 << 20


class Listed(NamedTuple):
    """An entry, and where its file lies or belongs."""

    entry: Entry
    path: Path
    present: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        size = self.path.stat().st_size if self.present else None
        return {**self.entry.to_dict(), "path": str(self.path), "present": self.present, "bytes": size}

    def row(self) -> dict[str, Any]:
        """What a table shows."""
        size_mib = self.path.stat().st_size / MIB if self.present else self.entry.size_mib
        return {
            "weights": self.entry.name,
            "here": "yes" if self.present else "no",
            "MiB": None if size_mib is None else float(f"{size_mib:.2g}" if size_mib < 10 else f"{size_mib:.0f}"),
            "licence": self.entry.licence.short,
            "for": self.entry.purpose,
        }


class Checked(NamedTuple):
    """The state of one file; `problem` says what is wrong, and what to do."""

    name: str
    path: Path
    status: Literal["ok", "wrong"]
    sha256: str | None
    trust: Trust | None
    problem: str = ""

    def row(self) -> dict[str, Any]:
        """What a table shows."""
        return {"weights": self.name, "status": self.status, "hash": self.trust, "sha256": self.sha256}


def survey() -> list[Listed]:
    """Every entry; nothing is read but whether its file is there."""
    found = {name: found_path(entry) for name, entry in entries().items()}
    return [
        Listed(entry, found[name] or expected_path(entry), found[name] is not None) for name, entry in entries().items()
    ]


def verify(names: Sequence[str] = ()) -> list[Checked]:
    """Compute the hash of every file that is here (or of those named), and compare.

    Raises:
        UserError: a name that does not exist, or whose file is not here.
    """
    chosen = [find(name) for name in names] if names else list(entries().values())
    notes = Notes(folder())
    checked = []
    for entry in chosen:
        path = found_path(entry)
        if path is not None:
            checked.append(_check(entry, path, notes))
        elif names:
            raise UserError(f"the weights '{entry.name}' are not in {folder()}", how_to_get(entry))
    return checked


def _check(entry: Entry, path: Path, notes: Notes) -> Checked:
    try:
        found = examine(entry, path, notes.rehash)
    except UserError as error:
        return Checked(entry.name, path, "wrong", None, None, str(error))
    return Checked(entry.name, path, "ok", found.sha256, found.trust)
